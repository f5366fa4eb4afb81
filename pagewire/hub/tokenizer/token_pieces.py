"""What each token of a tokenizer.json stands for, as its vocabulary and decoder say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pagewire.base.errors import ConfigError, PagewireError
from pagewire.hub.model_files import MAX_TOKENIZER_BYTES, read_bytes
from pagewire.hub.tokenizer.byte_level import MAX_TOKEN_ID, byte_level_bytes
from pagewire.hub.tokenizer.files import tokenizer_file

Piece = str | int | None
"""What a SentencePiece token stands for: text, one byte (0 to 255), or nothing to be shown."""

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def read_tokenizer(model_dir: Path) -> Tokenizer:
    """A model directory's tokenizer, without the truncation and padding of its training run.

    Raises:
        ConfigError: it is missing or wrong, or of a kind that cannot be converted to tokenizer.json.
    """
    path = tokenizer_file(model_dir)
    if path.parent == model_dir:
        return parse_tokenizer(path)
    try:
        return parse_tokenizer(path)
    except ConfigError as error:  # which names a file that the user has never seen
        raise ConfigError(f"{model_dir}: its tokenizer cannot be converted: {error.message}") from error


def parse_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, without the truncation and padding of its training run.

    Raises:
        ConfigError: it is wrong.
    """
    data = read_bytes(path, MAX_TOKENIZER_BYTES)
    if (merge := _fatal_merge(data)) is not None:
        raise ConfigError(
            f"{path}: not a tokenizer: the second part of the merge {merge!r} has no "
            "continuing_subword_prefix"
        )
    with no_panics(lambda reason: ConfigError(f"{path}: not a tokenizer: {reason}")):
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Some faults show only when a text goes through it.
        tokenizer.decode(tokenizer.encode(_TRIAL_TEXT, add_special_tokens=True).ids)
    return tokenizer


@contextmanager
def no_panics(refuse: Callable[[str], PagewireError]) -> Iterator[None]:
    """Around calls of the libraries in Rust that a file, or a text, may bring to fail. They raise no class of
    error of their own; where they find a bug in themselves, they raise what is not even an Exception."""
    try:
        yield
    except Exception as error:
        raise refuse(str(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise refuse(f"the library fails: {error}") from error


def _fatal_merge(data: bytes) -> Any:
    """A merge of a BPE that ends the process, or None: the library cuts the prefix from the second part
    without a look whether it is there, and if that is within a character, aborts (tokenizers 0.23)."""
    keys = len(_PREFIX_KEY.findall(data))
    if keys == len(_NO_PREFIX.findall(data)) and not _ESCAPED_LETTER.search(data):
        return None  # as in nearly every file, which is then not parsed twice
    try:
        model = json.loads(data)["model"]
        prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges or ()]
        return next((pair for pair in pairs if prefix and not pair[1].startswith(prefix)), None)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None  # the library says better what is wrong with it


_PREFIX_KEY = re.compile(rb'"continuing_subword_prefix"')
_NO_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*null')
_ESCAPED_LETTER = re.compile(rb"\\u00[567]")  # which might write the key in another way
_TRIAL_TEXT = "The quick brown fox isn't 12,345 years old: été, 北京!\n\tdef f(x): return x"


def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Control tokens such as the end of a turn, which are not text."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


def tokens_by_id(tokenizer: Tokenizer) -> list[str | None]:
    """The vocabulary's own spelling of each token; None where an id has none.

    Raises:
        ConfigError: an id is absurd.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    highest = max(vocabulary.values(), default=-1)
    if highest > MAX_TOKEN_ID:
        raise ConfigError(f"a token has the id {highest}; the highest that is read is {MAX_TOKEN_ID}")
    tokens: list[str | None] = [None] * (highest + 1)
    for token, token_id in vocabulary.items():
        tokens[token_id] = token
    return tokens


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each token adds to a text, by id; empty where an id has no token.

    Raises:
        ConfigError: the decoder is neither byte-level nor SentencePiece-style.
    """
    tokens = tokens_by_id(tokenizer)
    rules = decoder_rules(tokenizer)
    if rules is None:
        return [b"" if token is None else byte_level_bytes(token) for token in tokens]
    return [b"" if token is None else piece_bytes(rules.piece(token, first=False)) for token in tokens]


def decoder_rules(tokenizer: Tokenizer) -> SentencePieceRules | None:
    """How a SentencePiece-style decoder reads tokens; None for a byte-level one.

    Raises:
        ConfigError: the decoder is neither.
    """
    decoder = _decoder_settings(tokenizer)
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return None
    return SentencePieceRules.parse(steps)


def _decoder_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    if tokenizer.decoder is None:
        return {"type": "no decoder"}
    settings: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return settings


def piece_bytes(piece: Piece) -> bytes:
    """What a SentencePiece token adds to a text."""
    if piece is None:
        return b""
    return bytes([piece]) if isinstance(piece, int) else piece.encode("utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceRules:
    """What the steps of a SentencePiece-style decoder do to a token.

    Attributes:
        space: the character written for a space, if one is.
        byte_fallback: whether <0x41> means the byte 0x41.
        strip_spaces: leading spaces removed from the whole text.
        drop_first_space: whether the first token loses its spaces.
    """

    space: str | None = None
    byte_fallback: bool = False
    strip_spaces: int = 0
    drop_first_space: bool = False

    @classmethod
    def parse(cls, steps: list[dict[str, Any]]) -> SentencePieceRules:
        """Understands Metaspace alone, and Replace, ByteFallback, Fuse, Strip in this order."""
        match steps:
            case [{"type": "Metaspace", "replacement": str(space), "prepend_scheme": str(scheme)}]:
                return cls(space=space, drop_first_space=scheme != "never")
        rest = list(steps)
        rules: dict[str, Any] = {}
        match rest:
            case [{"type": "Replace", "pattern": {"String": str(space)}, "content": " "}, *_]:
                rules["space"] = space
                del rest[0]
        if rest and rest[0]["type"] == "ByteFallback":
            rules["byte_fallback"] = True
            del rest[0]
        match rest:
            case [] | [{"type": "Fuse"}] if rules:
                return cls(**rules)
            case [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": int(start), "stop": 0}]:
                return cls(**rules, strip_spaces=start)
        raise ConfigError(
            f"the tokenizer's decoder is {' + '.join(step['type'] for step in steps)}; ByteLevel, Metaspace, "
            "and Replace + ByteFallback + Fuse + Strip can be streamed"
        )

    def piece(self, token: str, *, first: bool) -> Piece:
        """What a token stands for, at the beginning of a text or within it."""
        if self.byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return int(byte[1], 16)
        if self.space is None:
            return token
        return token.replace(self.space, "" if first and self.drop_first_space else " ")
