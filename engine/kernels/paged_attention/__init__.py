"""Attention of new tokens over paged keys and values."""
