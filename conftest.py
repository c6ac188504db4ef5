"""For the tests of the core and of all plugins: some import diffusers before pilotfish does."""

from pilotfish import mend_torchvision

mend_torchvision()
