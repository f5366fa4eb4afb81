"""Model code: one file per family of architectures."""
