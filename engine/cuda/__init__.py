"""The runner whose rows, inputs and samples never leave the device between steps."""
