"""The quality of guided pictures: what is measured, its pictures, scores and drawings."""

import sys
from pathlib import Path

# The emoji world's pictures and Frechet distances are in the repository, and in no wheel.
sys.path.insert(0, str(Path(__file__).parents[2] / "plugins" / "pilotfish-emoji" / "training"))
