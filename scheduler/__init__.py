"""The scheduler: continuous batching, paged KV blocks and the prefix cache. No torch."""
