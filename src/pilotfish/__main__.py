"""`python -m pilotfish` is the command `pilotfish`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="pilotfish")
