"""What quantized checkpoints have in common."""
