"""Agent frameworks and tools of others, unmodified, against a running service."""
