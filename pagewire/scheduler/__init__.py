"""Generated stubs of protos/pagewire/scheduler."""
