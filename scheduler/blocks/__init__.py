"""The KV pool as the scheduler sees it: blocks, their hashes, and which prefixes they hold."""
