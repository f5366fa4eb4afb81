"""config.json into ModelConfig: a reader for each family, and what they share."""
