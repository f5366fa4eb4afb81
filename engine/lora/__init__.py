"""LoRA adapters: PEFT directories read and checked, fitted to a model's layers, and kept for its slots."""
