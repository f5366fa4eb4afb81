"""How fast the engine is: workloads with names, through the real processes."""
