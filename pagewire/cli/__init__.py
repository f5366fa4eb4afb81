"""The `pagewire` command."""
