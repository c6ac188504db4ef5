"""A run as data: what was asked for, run files, pictures that hold their run."""
