"""Benchmarks: each module is a command that prints its figures and, with --json, writes them down."""
