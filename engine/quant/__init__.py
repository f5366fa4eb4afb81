"""Quantized weights: what checkpoints say of them (readers, schemes), how each format loads (methods), and
the few forms that they have in memory (layouts), with what multiplies by them (products)."""
