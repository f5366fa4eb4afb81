"""The web console: two pages, their files, and the events that the engine's page shows."""
