"""Reads a SentencePiece model file."""

from __future__ import annotations

from pathlib import Path

from pagewire.base.errors import ConfigError
from pagewire.hub.model_files import MAX_TOKENIZER_BYTES, read_bytes
from pagewire.hub.tokenizer.piece_tokenizer import PieceType, PieceVocabulary

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType


def read_sentencepiece(path: Path) -> PieceVocabulary:
    """The vocabulary of a tokenizer.model.

    Raises:
        ConfigError: it is no SentencePiece model, or one of words or characters, or one that puts spaces
            behind words.
    """
    # Imported here because it is slow and most models have a tokenizer.json.
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(read_bytes(path, MAX_TOKENIZER_BYTES))
    except DecodeError as error:
        raise ConfigError(f"{path}: not a SentencePiece model: {error}") from error
    if not model.pieces:
        raise ConfigError(f"{path}: not a SentencePiece model: it has no pieces")
    # What is no UTF-8, the library for the format hands out as bytes.
    texts = [
        *(piece.piece for piece in model.pieces),
        model.trainer_spec.bos_piece,
        model.normalizer_spec.name,
    ]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{path}: not a SentencePiece model: a piece is not valid UTF-8")
    kind = model.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE):
        raise ConfigError(f"{path}: a SentencePiece model of words or characters; unigram and bpe are read")
    spec = model.normalizer_spec
    if model.trainer_spec.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise ConfigError(
            f"{path}: a SentencePiece model whose spaces are not the beginnings of words; only those are read"
        )
    types = [piece.type for piece in model.pieces]
    controls = {
        piece.piece: token_id
        for token_id, piece in enumerate(model.pieces)
        if piece.type == PieceType.CONTROL
    }
    return PieceVocabulary(
        kind="bpe" if kind == _BPE else "unigram",
        pieces=[piece.piece for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        types=types,
        byte_fallback=model.trainer_spec.byte_fallback or PieceType.BYTE in types,
        dummy_prefix=spec.add_dummy_prefix,
        remove_extra_spaces=spec.remove_extra_whitespaces,
        rules=spec.name,
        charsmap=spec.precompiled_charsmap,
        bos_id=controls.get(model.trainer_spec.bos_piece),
        eos_id=controls.get(model.trainer_spec.eos_piece),
    )
