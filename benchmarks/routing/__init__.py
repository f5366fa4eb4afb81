"""Routing among replicas in simulated time: prefix hits and times to the first token of several policies."""
