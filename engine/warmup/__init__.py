"""Kernels compiled ahead of their first launch: which ones, by whom, into which cache."""
