"""Masks for requests with constraints: made in threads, handed to the event loop."""
