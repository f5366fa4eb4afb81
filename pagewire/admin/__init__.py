"""Generated stubs of protos/pagewire/admin."""
