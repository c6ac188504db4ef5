"""Guidance away from what a weakened network predicts; one plugin a weakness, and they stack."""

from .attention import Pag, Seg
from .sag import Sag
from .weaker import Autoguidance, Slg

__all__ = ["Autoguidance", "Pag", "Sag", "Seg", "Slg"]
