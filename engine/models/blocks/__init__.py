"""The kinds of block that decoders are made of."""
