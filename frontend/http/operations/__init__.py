"""Everything but generation: models, tokens, health, metrics and the page about the API."""
