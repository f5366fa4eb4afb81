"""The engine: a worker daemon that owns weights and KV memory and executes step plans."""
