"""Generated stubs of protos/pagewire/triton."""
