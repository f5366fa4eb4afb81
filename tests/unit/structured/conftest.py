"""The tokenizers of the tests of text."""

from tests.unit.text.conftest import save_tokenizer

__all__ = ["save_tokenizer"]
