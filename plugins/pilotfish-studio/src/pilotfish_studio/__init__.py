"""A local page for pilotfish: `pilotfish studio`."""

from __future__ import annotations
