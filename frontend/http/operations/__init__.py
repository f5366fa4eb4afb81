"""Everything but generation: models, tokens, health, metrics and the front page."""
