"""Finds a model directory's tokenizer.json, and makes one of what other formats there are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagewire.base.cache_home import cache_home
from pagewire.base.errors import ConfigError
from pagewire.hub.cache import publish
from pagewire.hub.model_files import MAX_TOKENIZER_BYTES, read_bytes, read_json_object
from pagewire.hub.tokenizer.document import AddedToken, write_document
from pagewire.hub.tokenizer.merges_file import (
    MERGES,
    VOCABULARY,
    merges_document,
    read_merges,
    read_vocabulary,
    split_of,
)
from pagewire.hub.tokenizer.piece_tokenizer import PieceVocabulary, piece_document
from pagewire.hub.tokenizer.pre_tokenizers import LLAMA3_PATTERN, QWEN2_PATTERN
from pagewire.hub.tokenizer.sentencepiece_file import read_sentencepiece
from pagewire.hub.tokenizer.settings import SETTINGS_FILES, TokenizerSettings
from pagewire.hub.tokenizer.tiktoken_file import is_tiktoken, tiktoken_document, tiktoken_ranks

TOKENIZER_FILE = "tokenizer.json"
CHATGLM_TOKENS = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
"""What ChatGLM's tokenizer has behind its SentencePiece model, in this order, and no file lists."""
QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{index}|>" for index in range(205)),
)
"""What the tokenizer of Qwen's first version has behind its tiktoken file."""
_CONVERTER_VERSION = 1
"""Part of the identity of a converted tokenizer: raise it when the output for the same files changes."""
_IDENTITY_DIGITS = 16


def tokenizer_file(model_dir: Path) -> Path:
    """The tokenizer.json of a model directory: its own, or one that was converted from its SentencePiece
    model, tiktoken file, or vocab.json and merges.txt, and lies in the cache. The directory is not changed.

    Safe to call from several processes at once: one converts, the others wait for it.

    Raises:
        ConfigError: it has no tokenizer, or one that cannot be converted.
    """
    path = model_dir / TOKENIZER_FILE
    if path.is_file():
        return path
    source = _source(model_dir)
    if source is None:
        raise ConfigError(
            f"{model_dir}: has no tokenizer that is read: a {TOKENIZER_FILE}, a SentencePiece model "
            f"(tokenizer.model), a tiktoken file (qwen.tiktoken), or {VOCABULARY} with {MERGES}"
        )
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", model_dir.resolve().name)
    target = cache_home() / "tokenizers" / f"{stem}-{_identity(model_dir, source)}"
    publish(target, lambda staging: _convert(model_dir, source, staging), on_wait=lambda: None)
    return target / TOKENIZER_FILE


def has_tokenizer(model_dir: Path) -> bool:
    """Whether `tokenizer_file` has something to find."""
    return (model_dir / TOKENIZER_FILE).is_file() or _source(model_dir) is not None


def _source(model_dir: Path) -> Path | None:
    for pattern in ("tokenizer.model", "*.tiktoken", "*.model"):
        found = sorted(path for path in model_dir.glob(pattern) if path.is_file())
        if found:
            return found[0]
    both = all((model_dir / name).is_file() for name in (VOCABULARY, MERGES))
    return model_dir / VOCABULARY if both else None


def _identity(model_dir: Path, source: Path) -> str:
    """Of the content, so that copies of a model share one conversion and a file that changed gets another."""
    digest = hashlib.sha256(f"{_CONVERTER_VERSION} {source.name} {_model_type(model_dir)}".encode())
    merges = [model_dir / MERGES] if source.name == VOCABULARY else []
    for path in (source, *merges, *(model_dir / name for name in SETTINGS_FILES)):
        content = read_bytes(path, MAX_TOKENIZER_BYTES) if path.is_file() else b""
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:_IDENTITY_DIGITS]


def _model_type(model_dir: Path) -> str:
    path = model_dir / "config.json"
    model_type = read_json_object(path).get("model_type") if path.is_file() else None
    return model_type if isinstance(model_type, str) else ""


def _convert(model_dir: Path, source: Path, staging: Path) -> None:
    settings = TokenizerSettings.load(model_dir)
    try:
        if source.name == VOCABULARY:
            document = _from_merges(source, settings, _model_type(model_dir))
        elif is_tiktoken(source):
            document = _from_tiktoken(source, settings)
        else:
            document = _from_sentencepiece(source, settings, _model_type(model_dir))
    except ConfigError as error:
        named = error.message if str(model_dir) in error.message else f"{source}: {error.message}"
        raise ConfigError(named) from error
    try:
        write_document(staging / TOKENIZER_FILE, document)
    except UnicodeEncodeError as error:
        raise ConfigError(f"{model_dir}: a token of its tokenizer has half a surrogate pair") from error


def _from_sentencepiece(source: Path, settings: TokenizerSettings, model_type: str) -> dict[str, Any]:
    vocabulary = read_sentencepiece(source)
    if settings.add_prefix_space is False:
        vocabulary = replace(vocabulary, dummy_prefix=False)
    is_chatglm = settings.tokenizer_class == "ChatGLMTokenizer" or model_type == "chatglm"
    appended = _numbered(CHATGLM_TOKENS, len(vocabulary.pieces)) if is_chatglm else []
    ids = {piece: token_id for token_id, piece in enumerate(vocabulary.pieces)}
    added = _added(settings, ids, appended)
    ids |= {token.content: token.id for token in added}
    if is_chatglm:
        before = [(name, ids[name]) for name in ("[gMASK]", "sop")]
        behind: list[tuple[str, int]] = []
    else:
        before = _wanted(vocabulary, ids, settings, "bos", by_default=True)
        behind = _wanted(vocabulary, ids, settings, "eos", by_default=False)
    return piece_document(
        vocabulary, added=added, before=before, behind=behind, prefix_first_only=not settings.legacy
    )


def _wanted(
    vocabulary: PieceVocabulary,
    ids: dict[str, int],
    settings: TokenizerSettings,
    name: str,
    *,
    by_default: bool,
) -> list[tuple[str, int]]:
    """The token that begins or ends every text, if one does."""
    says = settings.add_bos_token if name == "bos" else settings.add_eos_token
    token_id = ids.get(settings.named.get(f"{name}_token", ""))
    if token_id is None:
        token_id = vocabulary.bos_id if name == "bos" else vocabulary.eos_id
    if token_id is None or not (by_default if says is None else says):
        return []
    if token_id in settings.added:
        return [(settings.added[token_id].content, token_id)]
    named = [text for text, each in ids.items() if each == token_id]
    return [(named[-1] if named else vocabulary.pieces[token_id], token_id)]


def _from_tiktoken(source: Path, settings: TokenizerSettings) -> dict[str, Any]:
    ranks = tiktoken_ranks(source)
    if settings.tokenizer_class in ("QWenTokenizer", "") and source.suffix == ".tiktoken":
        added = _added(settings, {}, _numbered(QWEN_TOKENS, max(ranks.values()) + 1))
        return tiktoken_document(ranks, QWEN2_PATTERN, added=added, nfc=True)
    if settings.tokenizer_class == "ChatGLM4Tokenizer":
        added = _added(settings, {}, [])
        ids = {token.content: token.id for token in added}
        before = [(name, ids[name]) for name in ("[gMASK]", "<sop>") if name in ids]
        return tiktoken_document(ranks, LLAMA3_PATTERN, added=added, before=before)
    raise ConfigError(
        f"{source}: a tiktoken file of {settings.tokenizer_class or 'an unknown tokenizer'}; those of "
        "QWenTokenizer (Qwen's first version) and ChatGLM4Tokenizer are read; others need a tokenizer.json"
    )


def _from_merges(source: Path, settings: TokenizerSettings, model_type: str) -> dict[str, Any]:
    pre_tokenizer = split_of(source, settings.tokenizer_class, model_type)
    vocab = read_vocabulary(source)
    merges = read_merges(source.with_name(MERGES), vocab)
    return merges_document(vocab, merges, pre_tokenizer, added=_added(settings, vocab, []))


def _numbered(tokens: Sequence[str], first: int) -> list[AddedToken]:
    return [AddedToken(id=first + index, content=token, special=True) for index, token in enumerate(tokens)]


def _added(
    settings: TokenizerSettings, ids: dict[str, int], appended: Sequence[AddedToken]
) -> list[AddedToken]:
    """The tokens that the files name and those that a family appends. A control token that nothing gives an
    id gets the next free one, as transformers does it."""
    tokens = {**settings.added, **{token.id: token for token in appended}}
    by_text = {**ids, **{token.content: token.id for token in tokens.values()}}
    for text in settings.special:
        token_id = by_text.get(text)
        if token_id is None:
            token_id = by_text[text] = max(by_text.values(), default=-1) + 1
        known = tokens.get(token_id, AddedToken(id=token_id, content=text))
        tokens[token_id] = replace(known, special=True)
    return list(tokens.values())
