"""Mixtures of experts: which experts a token uses, and what they make of it."""
