"""From raw logits to tokens and log probabilities on the GPU, without a full sort."""
