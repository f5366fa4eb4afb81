"""Kernels for CPUs in C++: matrices that stay in the blocks of GGUF files, and what lies between products."""
