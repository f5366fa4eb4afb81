"""Triton Inference Server's gRPC service."""
