"""Triton Inference Server's HTTP endpoints, under /v2."""
