"""The engine-worker process: command line, start-up, and the loop that executes plans."""
