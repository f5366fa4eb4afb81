"""What Ollama's endpoints take and answer."""
