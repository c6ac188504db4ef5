"""The quality of guided pictures: what is measured, its pictures, scores and drawings."""

import sys
from pathlib import Path

# The emoji worlds' pictures and Frechet distances are in the repository, and in no wheel.
for name in ("pilotfish-emoji", "pilotfish-emoji-flow"):
    sys.path.insert(0, str(Path(__file__).parents[2] / "plugins" / name / "training"))
