"""What plugins are: hooks, settings, how they are found, and how their answers combine."""
