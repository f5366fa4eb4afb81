"""What all runners share: their protocol, the host's record of rows, and prompt logprobs and pooling."""
