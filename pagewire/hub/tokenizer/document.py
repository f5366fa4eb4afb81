"""The parts of a tokenizer.json that converters of other formats have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_TOKEN_LENGTH = 512
"""In characters or bytes. Longer tokens would take too long to convert; published ones have a quarter."""

BYTE_LEVEL: Mapping[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
"""Bytes as letters, without a split of its own."""
GPT2: Mapping[str, Any] = {**BYTE_LEVEL, "use_regex": True}
"""The same behind GPT-2's split into words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that is found in a text before anything splits it.

    Attributes:
        special: whether it is a control token, which is no part of a text.
        normalized: whether it is looked for in the normalized text.
        lstrip, rstrip: whether white space before or behind it belongs to it.
        single_word: whether it must stand alone.
    """

    id: int
    content: str
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def entry(self) -> dict[str, Any]:
        """As `added_tokens` has it."""
        return {
            "id": self.id,
            "content": self.content,
            "single_word": self.single_word,
            "lstrip": self.lstrip,
            "rstrip": self.rstrip,
            "normalized": self.normalized,
            "special": self.special,
        }


def tokenizer_document(
    model: Mapping[str, Any],
    *,
    added: Iterable[AddedToken],
    normalizer: Mapping[str, Any] | None,
    pre_tokenizer: Mapping[str, Any] | None,
    post_processor: Mapping[str, Any] | None,
    decoder: Mapping[str, Any],
) -> dict[str, Any]:
    """A tokenizer.json."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token.entry() for token in sorted(added, key=lambda token: token.id)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }


def bpe_model(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    *,
    unknown: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The model of a byte pair encoding.

    Args:
        merges: pairs of tokens, best first.
        unknown: the token for characters that have none; a run of them is one token.
        byte_fallback: whether their bytes are written as <0x41> instead.
        ignore_merges: whether a word that is a token is that token, whatever the merges make of it.
    """
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    """A pre-tokenizer that makes each match of a regular expression a word."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def sequence(kind: str, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One step after another.

    Args:
        kind: "normalizers", "pretokenizers", "processors" or "decoders", as the format names the list.
    """
    if not steps:
        return None
    return dict(steps[0]) if len(steps) == 1 else {"type": "Sequence", kind: list(steps)}


def surrounding(
    before: Sequence[tuple[str, int]], behind: Sequence[tuple[str, int]]
) -> dict[str, Any] | None:
    """The post-processor that adds tokens, each with its id, around every text."""
    if not before and not behind:
        return None
    first = [{"SpecialToken": {"id": token, "type_id": 0}} for token, _ in before]
    last = [{"SpecialToken": {"id": token, "type_id": 0}} for token, _ in behind]
    single = [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [token_id], "tokens": [token]}
            for token, token_id in (*before, *behind)
        },
    }


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Raises OSError, and UnicodeEncodeError if a token has half a surrogate pair."""
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
