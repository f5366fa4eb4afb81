"""Token masks for constrained requests: computed in threads, passed to the event loop."""
