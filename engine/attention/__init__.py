"""Attention over the paged KV cache, by one of several backends behind one interface."""
