"""The HTTP server: a folder for each API, and what they share."""
