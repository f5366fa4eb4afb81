"""A conversation at the terminal: what `pagewire chat` is made of."""
