"""The scheduler's process: gRPC, what comes in, what goes out, and what drives the core."""
