"""What quantized checkpoints have in common, such as which modules they leave out.

How a format stores weights and multiplies is a linear method (engine/layers/linear_method.py), which a
platform's `linear_methods` chooses."""
