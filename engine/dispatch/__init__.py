"""How the scheduler and the workers talk, and what both must agree on: rings in shared memory, the records in
them, the handshake, limits, and the one definition of sampling parameters (sampling.py). No torch."""
