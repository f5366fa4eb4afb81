"""What everything stands on: errors, settings, the life of a process, configuration <-> command line."""
