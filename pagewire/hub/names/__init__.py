"""What users type for a model, and what it stands for."""
