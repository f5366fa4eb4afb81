"""The link to the workers: attaching, the watchdog, and the timing of plans."""
