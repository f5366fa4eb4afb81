"""How byte-level tokenizers split a text into words, by the names that GGUF files have for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagewire.hub.tokenizer.document import BYTE_LEVEL, GPT2, split

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# The published patterns of Llama 3 (which is GPT-4's) and Qwen 2 differ in how many digits stay together.
LLAMA3_PATTERN, QWEN2_PATTERN = (
    _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
# Those of GPT-4o and Mistral's Tekken split words where capitals begin, and keep paths together.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _by_case(endings: str, digits: str) -> str:
    words = "|".join(
        r"[^\r\n\p{L}\p{N}]?" + letters + endings
        for letters in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
    )
    return words + "|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES


GPT4O_PATTERN = _by_case(f"{_ENDINGS}?", r"\p{N}{1,3}")
TEKKEN_PATTERN = _by_case("", r"\p{N}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """Attributes:
    steps: the pre-tokenizers of tokenizer.json.
    nfc: whether texts are brought into Unicode's composed form first.
    whole_words: whether a word that is a token is that token, whatever the merges make of it, as tiktoken
        has it.
    adds_bos: whether texts begin with bos if the file does not say.
    """

    steps: Sequence[Mapping[str, Any]]
    nfc: bool = False
    whole_words: bool = False
    adds_bos: bool = False


_WORDS = [GPT2]
_DIGITS_AND_WORDS = [{"type": "Digits", "individual_digits": True}, GPT2]
_GPT4 = PreTokenizer(steps=[split(LLAMA3_PATTERN), BYTE_LEVEL], whole_words=True)
_GPT4O = PreTokenizer(steps=[split(GPT4O_PATTERN), BYTE_LEVEL], whole_words=True)
_LLAMA3 = PreTokenizer(steps=_GPT4.steps, whole_words=True, adds_bos=True)
_QWEN2 = PreTokenizer(steps=[split(QWEN2_PATTERN), BYTE_LEVEL], nfc=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(steps=_WORDS),
    "phi-2": PreTokenizer(steps=_WORDS),
    "olmo": PreTokenizer(steps=_WORDS, nfc=True),
    "smollm": PreTokenizer(steps=_DIGITS_AND_WORDS),
    "starcoder": PreTokenizer(steps=_DIGITS_AND_WORDS),
    "refact": PreTokenizer(steps=_DIGITS_AND_WORDS),
    "command-r": PreTokenizer(steps=_DIGITS_AND_WORDS, nfc=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _GPT4,
    "smaug-bpe": _GPT4,
    "glm4": _GPT4,
    "chatglm-bpe": _GPT4,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": _QWEN2,
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
    "tekken": PreTokenizer(steps=[split(TEKKEN_PATTERN), BYTE_LEVEL], whole_words=True, adds_bos=True),
}
"""By the name in `tokenizer.ggml.pre`. Granite's files say refact, OLMo 2's and Phi-4's dbrx, those of
gpt-oss and Phi-4-mini gpt-4o."""
