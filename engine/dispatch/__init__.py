"""How the scheduler and the workers talk: shared-memory rings, binary records, a control socket. No torch."""
