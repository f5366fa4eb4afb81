"""Kernels: one folder per operation, each with a naive reference that says what it computes."""
