"""Generated stubs of protos/pagewire/inference."""
