"""Anthropic's API: messages, as Claude's clients send and read them."""
