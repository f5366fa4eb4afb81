"""Sums of hidden states over chunks of prompts."""
