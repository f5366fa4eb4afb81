"""Sums, and exchanges, over GPUs that can write into each other's memory."""
