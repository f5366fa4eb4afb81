"""How the ranks that share a model communicate: gloo between processes on CPUs, NCCL between GPUs."""
