"""How the emoji model was trained and measured; runs from the repository, in no wheel."""
