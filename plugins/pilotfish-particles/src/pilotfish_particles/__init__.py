"""Search without gradients: several candidates of each picture, of which the better go on.

What is better the run's guides say, by their losses: those that move the run too, and those with
`gradient="none"`, which are measured only and need not be differentiable.
"""

from pilotfish_particles.filters import Das, FeynmanKac
from pilotfish_particles.searches import BestOf, Search, Svdd

__all__ = ["BestOf", "Das", "FeynmanKac", "Search", "Svdd"]
