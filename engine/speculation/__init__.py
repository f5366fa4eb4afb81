"""Speculative decoding: settings, what proposes draft tokens, and which of them are accepted."""
