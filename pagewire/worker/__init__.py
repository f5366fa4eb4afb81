"""Generated stubs of protos/pagewire/worker."""
