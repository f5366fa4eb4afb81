"""The link to the workers: attaching, watching, and when a plan goes out."""
