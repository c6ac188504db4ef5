"""What `speed.py` is made of: models, rows, measurements, scenes and reports."""

from pilotfish import mend_torchvision

mend_torchvision()  # before anything here imports open_clip or diffusers
