"""Conversations: tools, what a model's reply means, and how it is read. No protocol, no I/O."""
