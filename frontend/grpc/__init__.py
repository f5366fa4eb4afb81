"""The public gRPC API: messages to and from the generation pipeline."""
