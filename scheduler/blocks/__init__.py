"""The KV block pool: blocks, their hashes and the prefix cache."""
