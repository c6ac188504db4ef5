"""The sampling loop, and what it is made of."""
