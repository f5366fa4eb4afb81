"""Tokenizers of every kind of file, as one tokenizer.json."""
