"""Requests that files tell of: conversations of ShareGPT's form, and traces of when how much was asked."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pagewire.base.errors import ConfigError
from pagewire.bench.serve.datasets import Ask, Dataset
from pagewire.bench.serve.prompts import PromptMaker

TRACE_BLOCK = 512
"""Tokens that one of a trace's hash ids stands for, as Mooncake's traces have it."""
SHORTEST, LONGEST_PROMPT, LONGEST = 4, 1024, 2048
"""Of a conversation's first prompt and answer, in tokens; the bounds the field uses for ShareGPT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversations(Dataset):
    """First questions of conversations, and answers as long as theirs were. Where a run wants more requests
    than there are, they begin again.

    Attributes:
        entries: prompt, its tokens, tokens of the answer, in a random order.
    """

    entries: tuple[tuple[str, int, int], ...]

    @property
    def size(self) -> int | None:
        """See Dataset."""
        return len(self.entries)

    def ask(self, run: str, index: int) -> Ask:
        """See Dataset."""
        return Ask(*self.entries[index % len(self.entries)])

    def __str__(self) -> str:
        return f"{len(self.entries)} conversations"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace(Dataset):
    """Requests of recorded lengths, whose prompts share what the trace says they share.

    Attributes:
        entries: seconds from the first, prompt tokens, output tokens, ids of the prompt's blocks.
        speed: how many times as fast as it was recorded.
    """

    entries: tuple[tuple[float, int, int, tuple[int, ...]], ...]
    speed: float = 1.0

    @property
    def size(self) -> int | None:
        """See Dataset."""
        return len(self.entries)

    def offset(self, index: int) -> float:
        """Seconds from the start at which a request is due."""
        return self.entries[index][0] / self.speed

    def ask(self, run: str, index: int) -> Ask:
        """See Dataset."""
        _, input_len, output_len, blocks = self.entries[index % len(self.entries)]
        token_ids: list[int] = []
        for block in blocks:
            token_ids += self._tokens(TRACE_BLOCK, run, "block", block)
        own = self._tokens(max(0, input_len - len(token_ids)), run, index)
        return self._ask(token_ids[:input_len] + own, output_len)

    def __str__(self) -> str:
        return f"trace of {len(self.entries)} requests"


def read_conversations(path: Path, maker: PromptMaker, seed: int) -> Conversations:
    """A JSON list of {"conversations": [{"from", "value"}, ...]}, as ShareGPT's are.

    Raises:
        ConfigError: it cannot be read, or has no conversation of usual length.
    """
    try:
        listed = json.loads(_text(path))
        entries = [_entry(each["conversations"], maker) for each in listed if len(each["conversations"]) > 1]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'{path}: is no JSON list of {{"conversations": [{{"value": TEXT}}, ...]}}: {error!r}',
            param="dataset_path",
        ) from error
    usual = [
        entry
        for entry in entries
        if SHORTEST <= entry[1] <= LONGEST_PROMPT and entry[2] >= SHORTEST and entry[1] + entry[2] <= LONGEST
    ]
    if not usual:
        raise ConfigError(
            f"{path}: none of its {len(entries)} conversations has a prompt of {SHORTEST} to "
            f"{LONGEST_PROMPT} tokens and an answer that makes it {LONGEST} at most",
            param="dataset_path",
        )
    random.Random(seed).shuffle(usual)
    return Conversations(maker=maker, seed=seed, entries=tuple(usual))


def _entry(turns: list[dict[str, Any]], maker: PromptMaker) -> tuple[str, int, int]:
    prompt, answer = turns[0]["value"], turns[1]["value"]
    return prompt, maker.count(prompt), maker.count(answer)


def read_trace(path: Path, maker: PromptMaker, seed: int, speed: float) -> Trace:
    """JSON lines of timestamp (milliseconds), input_length, output_length and, if prompts share, hash_ids, as
    Mooncake's traces are; or a .csv file of TIMESTAMP, ContextTokens and GeneratedTokens, as Azure's are.

    Raises:
        ConfigError: it cannot be read.
    """
    text = _text(path)
    try:
        rows = _azure(text) if path.suffix == ".csv" else _mooncake(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: is neither JSON lines of timestamp, input_length and output_length nor a .csv file of "
            f"TIMESTAMP, ContextTokens and GeneratedTokens: {error!r}",
            param="dataset_path",
        ) from error
    # A request without prompt or output is none; Azure's traces have some.
    rows = sorted(row for row in rows if row[1] > 0 and row[2] > 0)
    if not rows:
        raise ConfigError(f"{path}: has no requests", param="dataset_path")
    first = rows[0][0]
    entries = tuple((at - first, *rest) for at, *rest in rows)
    return Trace(maker=maker, seed=seed, entries=entries, speed=speed)  # type: ignore[arg-type]


def _mooncake(text: str) -> list[tuple[float, int, int, tuple[int, ...]]]:
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [
        (
            float(row["timestamp"]) / 1000,
            int(row["input_length"]),
            int(row["output_length"]),
            tuple(map(int, row.get("hash_ids", ()))),
        )
        for row in rows
    ]


def _azure(text: str) -> list[tuple[float, int, int, tuple[int, ...]]]:
    return [
        (
            datetime.fromisoformat(row["TIMESTAMP"]).timestamp(),
            int(row["ContextTokens"]),
            int(row["GeneratedTokens"]),
            (),
        )
        for row in csv.DictReader(io.StringIO(text))
    ]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}", param="dataset_path") from error
