"""model -> Scores: what a compressed model kept."""
