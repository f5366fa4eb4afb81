"""What adapters (LoRA, arXiv:2106.09685) add to the product of a linear layer, for tokens of many adapters
at once."""
