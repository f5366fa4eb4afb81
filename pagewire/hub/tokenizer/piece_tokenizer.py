"""SentencePiece vocabularies as tokenizer.json, so that ids equal those of the sentencepiece library.

They come from a tokenizer.model (`sentencepiece_file`) or from a GGUF file's metadata (`gguf_tokenizer`).
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from pagewire.base.errors import ConfigError
from pagewire.hub.tokenizer.document import (
    MAX_TOKEN_LENGTH,
    AddedToken,
    bpe_model,
    sequence,
    split,
    surrounding,
    tokenizer_document,
)

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_SHOWN = 100
_NEVER = -1000.0
"""The score of a piece that no text may be split into: lower than that of any text's characters."""


class PieceType(IntEnum):
    """What a piece is, by the numbers of SentencePiece's and of GGUF's `token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceVocabulary:
    """A SentencePiece model.

    Attributes:
        kind: how a text is split: by merging its best neighbours, or into the pieces of the best sum.
        pieces, scores, types: by id.
        byte_fallback: whether characters without a piece are written as bytes.
        dummy_prefix: whether a space is put before every text.
        remove_extra_spaces: whether runs of spaces are one space, and those at the ends none.
        rules: the name of the rules of normalization; "identity" for none.
        charsmap: the same compiled, empty for none.
        bos_id, eos_id: the control pieces for the beginning and the end of a text, if it has them.
    """

    kind: Literal["bpe", "unigram"]
    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    byte_fallback: bool = False
    dummy_prefix: bool = True
    remove_extra_spaces: bool = False
    rules: str = "identity"
    charsmap: bytes = b""
    bos_id: int | None = None
    eos_id: int | None = None

    def of_type(self, *kinds: PieceType) -> list[int]:
        """The ids of the pieces of these types."""
        return [token_id for token_id, kind in enumerate(self.types) if kind in kinds]


def piece_document(
    vocabulary: PieceVocabulary,
    *,
    added: Sequence[AddedToken] = (),
    before: Sequence[tuple[str, int]] = (),
    behind: Sequence[tuple[str, int]] = (),
    prefix_first_only: bool = False,
) -> dict[str, Any]:
    """A tokenizer.json that encodes and decodes as the sentencepiece library does.

    Control pieces that are written in a text are tokens, where the library takes them for text; behind each
    such token the dummy prefix is put again, as the families' own tokenizers do.

    Args:
        added: tokens besides, or in place of, those that the vocabulary has.
        before, behind: tokens to put around every text, with their ids.
        prefix_first_only: whether the dummy prefix is only put at the beginning of a text.

    Raises:
        ConfigError: the vocabulary contradicts itself.
    """
    pieces = list(vocabulary.pieces)
    longest = max(pieces, key=len, default="")
    if len(longest) > MAX_TOKEN_LENGTH:
        raise ConfigError(
            f"the token {longest[:_SHOWN]!r}... has {len(longest)} characters; at most {MAX_TOKEN_LENGTH} "
            "are read"
        )
    every = {token.id: token for token in [*_own_added(vocabulary), *added]}
    for token in every.values():
        if token.id < len(pieces):
            pieces[token.id] = token.content
    _require_unique([*pieces, *(token.content for token in every.values() if token.id >= len(pieces))])
    model = _bpe if vocabulary.kind == "bpe" else _unigram
    symbols = [token.content for token in every.values() if token.normalized]
    splits = _first_prefix() if prefix_first_only and vocabulary.dummy_prefix else []
    if vocabulary.kind == "unigram":
        splits.append(_no_control_pieces([token.content for token in every.values() if token.special]))
    return tokenizer_document(
        model(vocabulary, pieces, every),
        added=every.values(),
        normalizer=_normalizer(vocabulary, symbols, prefixed=not prefix_first_only),
        pre_tokenizer=sequence("pretokenizers", splits),
        post_processor=surrounding(before, behind),
        decoder=_decoder(vocabulary),
    )


def _own_added(vocabulary: PieceVocabulary) -> list[AddedToken]:
    """Control pieces, and the user's symbols, which are looked for in the normalized text."""
    controls = [
        AddedToken(id=token_id, content=vocabulary.pieces[token_id], special=True)
        for token_id in vocabulary.of_type(PieceType.CONTROL, PieceType.UNKNOWN)
    ]
    if vocabulary.kind == "unigram":  # where the user's symbols are pieces like any other
        return controls
    symbols = [
        AddedToken(id=token_id, content=vocabulary.pieces[token_id], normalized=True)
        for token_id in vocabulary.of_type(PieceType.USER_DEFINED)
    ]
    return [*controls, *symbols]


def _require_unique(tokens: Sequence[str]) -> None:
    if len(set(tokens)) != len(tokens):
        twice, _ = Counter(tokens).most_common(1)[0]
        raise ConfigError(f"the token {twice[:_SHOWN]!r} is in the vocabulary twice")


def _bpe(
    vocabulary: PieceVocabulary, pieces: Sequence[str], added: Mapping[int, AddedToken]
) -> dict[str, Any]:
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    vocab |= {token.content: token.id for token in added.values()}
    [unknown, *_] = [*vocabulary.of_type(PieceType.UNKNOWN), None]
    scores = {
        pieces[token_id]: vocabulary.scores[token_id]
        for token_id in vocabulary.of_type(PieceType.NORMAL)
        if token_id not in added
    }
    return bpe_model(
        vocab,
        _merges(scores),
        unknown=None if unknown is None else pieces[unknown],
        byte_fallback=vocabulary.byte_fallback,
    )


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that together are a piece, those with the best one first.

    SentencePiece knows no pairs: it joins the neighbours whose piece has the best score, and of several such
    the leftmost. Where one piece can be made of several pairs, the pair with the longer left part is best:
    that is where the leftmost neighbours of a run lie.
    """
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _unigram(
    vocabulary: PieceVocabulary, pieces: Sequence[str], added: Mapping[int, AddedToken]
) -> dict[str, Any]:
    """A vocabulary's place is its token's id, so that ids without a token need something there too."""
    size = max([len(pieces), *(token_id + 1 for token_id in added)])
    gaps = {token_id: f"<no token {token_id}>" for token_id in range(len(pieces), size)}
    contents = dict(enumerate(pieces)) | gaps | {token.id: token.content for token in added.values()}
    may_be_in_texts = vocabulary.of_type(PieceType.NORMAL, PieceType.USER_DEFINED)
    scores = {token_id: vocabulary.scores[token_id] for token_id in may_be_in_texts}
    entries = [
        [contents[token_id], _NEVER if token_id in added else scores.get(token_id, _NEVER)]
        for token_id in range(size)
    ]
    [unknown, *_] = [*vocabulary.of_type(PieceType.UNKNOWN), None]
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": entries,
        "byte_fallback": vocabulary.byte_fallback,
    }


def _normalizer(
    vocabulary: PieceVocabulary, symbols: Collection[str], *, prefixed: bool
) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if vocabulary.charsmap:
        charsmap = base64.b64encode(vocabulary.charsmap).decode()
        compiled = [{"type": "Precompiled", "precompiled_charsmap": charsmap}]
        steps += _KNOWN_RULES.get(vocabulary.rules, compiled)
    if vocabulary.remove_extra_spaces:
        steps.append(_replace({"Regex": r"\A +| +\z"}, ""))
        steps.append(_replace({"Regex": " {2,}"}, " "))
    steps.append(_replace({"String": " "}, SPACE))
    if vocabulary.dummy_prefix and prefixed:
        steps.append(_prefix(symbols))
    return sequence("normalizers", steps)


def _replace(pattern: Mapping[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


_NFKC = {"type": "NFKC"}
_NO_CHARACTER = "\ufdd0"
# The library that runs compiled rules loses marks behind characters that it replaces, so the common rules are
# spelled out. nmt_nfkc drops control characters, makes spaces of others, and leaves the wide tilde as it is.
_KNOWN_RULES: Mapping[str, list[dict[str, Any]]] = {
    "nfkc": [_NFKC],
    "nmt_nfkc": [
        _replace({"Regex": r"[\x01-\x08\x0B\x0E-\x1F\x7F\u008F\u009F]"}, ""),
        _replace({"Regex": r"[\t\n\f\r\u061C\u1680\u200B\u200C\u200E\u200F\u2028\u2029\uFEFF\uFFFD]"}, " "),
        _replace({"String": "\uff5e"}, _NO_CHARACTER),
        _NFKC,
        _replace({"String": _NO_CHARACTER}, "\uff5e"),
    ],
}


def _prefix(symbols: Collection[str]) -> dict[str, Any]:
    """Puts the dummy prefix. The user's symbols go through the normalizer too before they are looked for in
    a text, and must come out as they are."""
    if not symbols:
        return {"type": "Prepend", "prepend": SPACE}
    alone = "|".join(re.escape(symbol) for symbol in symbols)
    return _replace({"Regex": rf"\A(?!(?:{alone}|)\z)"}, SPACE)


def _first_prefix() -> list[dict[str, Any]]:
    """Puts the dummy prefix at the beginning of a text, and not behind its special tokens. Metaspace leaves
    it out before a space, so it is told of a text that has no spaces any more, and another one turns the
    space that it puts into a block."""
    put = {"type": "Metaspace", "replacement": " ", "prepend_scheme": "first", "split": False}
    write = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}
    return [put, write]


def _no_control_pieces(controls: Collection[str]) -> dict[str, Any]:
    """Sets the first character of what spells a byte or a control piece apart, so that no text becomes it:
    Unigram finds every token of its vocabulary in a text."""
    spelled = [f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in controls if len(text) > 1]
    return split("|".join(["<(?=0x[0-9A-F]{2}>)", *spelled]))


def _decoder(vocabulary: PieceVocabulary) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [_replace({"String": SPACE}, " ")]
    if vocabulary.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if vocabulary.dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
