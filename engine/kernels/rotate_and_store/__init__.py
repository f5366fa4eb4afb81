"""From fused projections to attention's inputs: head norms, rotary embedding, the paged cache's store."""
