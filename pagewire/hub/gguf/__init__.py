"""GGUF files: read, and written anew in Hugging Face's layout."""
