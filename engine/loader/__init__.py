"""Filling a model's parameters: from Hugging Face checkpoints, or with random numbers."""
