"""What processes tell about their work: spans of traces, logs with the ids of requests, GPU readings."""
