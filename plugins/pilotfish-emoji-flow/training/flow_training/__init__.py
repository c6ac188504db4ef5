"""How the flow model was trained and measured; runs from the repository, in no wheel."""
