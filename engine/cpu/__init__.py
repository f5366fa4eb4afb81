"""Plans run on CPUs, by torch's operators. Mirrors engine/cuda."""
