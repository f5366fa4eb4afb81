"""The texts that activations are looked at for: from a file of lines, or those that come with pagewire."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagewire.base.errors import ConfigError, InvalidRequest
from pagewire.batch.lines import Line, read_lines
from pagewire.hub.tokenizer.token_pieces import read_tokenizer
from pagewire.wire.query_history import to_messages

_FORMS = '"text", or "messages", or "query" and "response"'


def calibration_tokens(
    directory: Path, dataset: Path | None, *, num_samples: int, length: int, vocab_size: int
) -> npt.NDArray[np.int64]:
    """Texts in tokens, [samples, length]: all lines one after the other, cut into pieces, of which
    `num_samples` at most are taken, from everywhere.

    Args:
        directory: the model's, with its tokenizer.
        dataset: lines of JSON; None for the text that comes with pagewire.

    Raises:
        ConfigError: the model has no tokenizer, the file has a line that is no text, or too little of it.
    """
    tokenizer = read_tokenizer(directory)
    texts = list(_texts(dataset))
    ids: list[int] = []
    for encoded in tokenizer.encode_batch(texts):
        ids.extend(encoded.ids)
    where = "the calibration text" if dataset is None else str(dataset)
    if len(ids) < length:
        raise ConfigError(
            f"{where} has {len(ids)} tokens; calibration needs {length} at least, better "
            f"{num_samples * length}: give more lines, or a smaller sample_length",
            param="dataset",
        )
    if max(ids) >= vocab_size:
        raise ConfigError(
            f"{directory}: its tokenizer has the token {max(ids)}, and the model {vocab_size} of them"
        )
    windows = np.array(ids[: len(ids) // length * length], dtype=np.int64).reshape(-1, length)
    chosen = np.linspace(0, len(windows) - 1, min(num_samples, len(windows))).round().astype(np.int64)
    return windows[chosen]


def _texts(dataset: Path | None) -> Iterator[str]:
    if dataset is not None:
        yield from (_text(dataset, line) for line in read_lines(dataset))
        return
    own = files("pagewire.export").joinpath("calibration.jsonl")
    for number, content in enumerate(own.read_bytes().splitlines(), 1):
        yield _text(Path("calibration.jsonl"), Line(number, content))


def _text(path: Path, line: Line) -> str:
    """What a line says.

    Raises:
        ConfigError: it has none of the forms.
    """
    try:
        fields = line.fields()
        text = _of_fields(fields, f"line {line.number}")
    except InvalidRequest as error:
        raise ConfigError(f"{path}: {error.message}", param="dataset") from None
    if text is None:
        raise ConfigError(f"{path}: line {line.number} has no text; it must have {_FORMS}", param="dataset")
    return text


def _of_fields(fields: dict[str, Any], name: str) -> str | None:
    if isinstance(fields.get("text"), str):
        return str(fields["text"])
    messages = fields.get("messages")
    if messages is None and "query" in fields:
        messages = to_messages(fields, name)
        if isinstance(fields.get("response"), str):
            messages.append({"role": "assistant", "content": fields["response"]})
    if not isinstance(messages, list):
        return None
    contents = [each.get("content") if isinstance(each, dict) else None for each in messages]
    if not contents or not all(isinstance(content, str) for content in contents):
        return None
    return "\n\n".join(str(content) for content in contents)
