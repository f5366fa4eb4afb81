"""Triton Inference Server's protocol, as far as HTTP and gRPC have it in common."""
