"""Traces of requests: conversations that are made up, or a file of recorded requests."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from pagewire.wire.block_hashes import HASH_BYTES, BlockHash

BLOCK_SIZE = 64
"""Tokens of a simulated block: more than an engine's 16, so that a request is fewer objects."""

RECORDED_BLOCK_SIZE = 512


@dataclass(slots=True)
class TracedRequest:
    """A request of a trace.

    Attributes:
        at: seconds from the trace's begin.
        hashes: of its prompt's full blocks.
        later: of the blocks that are there when it has been answered, its prompt's included.
        num_prompt_tokens, num_output_tokens: how long it is.
        session: what a router by sessions would go by.
    """

    at: float
    hashes: list[BlockHash]
    later: list[BlockHash]
    num_prompt_tokens: int
    num_output_tokens: int
    session: int


@dataclass(frozen=True, slots=True)
class Conversations:
    """What made-up conversations are like.

    Attributes:
        tenants: system prompts, of which few are used often (Zipf's law with exponent 1).
        system_tokens: of a system prompt, from and to.
        turns: of a conversation, on average.
        turn_tokens: what a user adds in a turn, on average.
        output_tokens: of an answer, on average.
        pause: seconds between an answer and the next turn, on average.
    """

    tenants: int = 200
    system_tokens: tuple[int, int] = (256, 4096)
    turns: float = 6.0
    turn_tokens: float = 200.0
    output_tokens: float = 250.0
    pause: float = 8.0


class _Names:
    """Block hashes that nobody else has."""

    def __init__(self) -> None:
        self._next = 0

    def draw(self, count: int) -> list[BlockHash]:
        begin, self._next = self._next, self._next + count
        return [number.to_bytes(HASH_BYTES, "little") for number in range(begin, self._next)]


def made_up(kind: Conversations, rate: float, seconds: float, seed: int) -> list[TracedRequest]:
    """Requests of conversations, `rate` of them a second, by time.

    Conversations begin before the trace does, so that it does not begin with first turns alone.
    """
    generator, names = random.Random(seed), _Names()
    systems = []
    for _ in range(kind.tenants):
        tokens = generator.randint(*kind.system_tokens)
        systems.append((tokens, names.draw(tokens // BLOCK_SIZE)))
    weights = list(accumulate(1 / (rank + 1) for rank in range(kind.tenants)))
    lead = 4 * kind.turns * kind.pause
    requests: list[TracedRequest] = []
    at, session = -lead, 0
    while True:
        at += generator.expovariate(rate / kind.turns)
        if at >= seconds:
            break
        session += 1
        tokens, blocks = systems[generator.choices(range(kind.tenants), cum_weights=weights)[0]]
        requests += _conversation(kind, at, session, tokens, blocks, generator, names, seconds)
    return sorted((each for each in requests if each.at >= 0), key=lambda each: each.at)


def _conversation(
    kind: Conversations,
    at: float,
    session: int,
    tokens: int,
    system: list[BlockHash],
    generator: random.Random,
    names: _Names,
    seconds: float,
) -> Iterator[TracedRequest]:
    blocks = list(system)
    while at < seconds:
        tokens += 1 + int(generator.expovariate(1 / kind.turn_tokens))
        blocks += names.draw(tokens // BLOCK_SIZE - len(blocks))
        output = 1 + int(generator.expovariate(1 / kind.output_tokens))
        later = blocks + names.draw((tokens + output) // BLOCK_SIZE - len(blocks))
        yield TracedRequest(at, blocks[:], later, tokens, output, session)
        tokens, blocks = tokens + output, list(later)
        at += output * 0.012 + generator.expovariate(1 / kind.pause)
        if generator.random() < 1 / kind.turns:
            return


def recorded(path: Path) -> list[TracedRequest]:
    """Requests of a file in the form of Mooncake's traces: a JSON object a line with `timestamp` (ms),
    `input_length`, `output_length` and `hash_ids`, one for each 512 tokens of the prompt.

    A request's session is its first block: such files name none.

    Raises:
        ValueError: a line is no such object.
    """
    parts = RECORDED_BLOCK_SIZE // BLOCK_SIZE
    requests = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        try:
            ids, length = [int(each) for each in entry["hash_ids"]], int(entry["input_length"])
            at, output = float(entry["timestamp"]) / 1e3, int(entry["output_length"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: no request: {line[:80]}") from error
        hashes = [
            (each * parts + part).to_bytes(HASH_BYTES, "little") for each in ids for part in range(parts)
        ]
        hashes = hashes[: length // BLOCK_SIZE]
        requests.append(TracedRequest(at, hashes, hashes, length, max(1, output), ids[0] if ids else 0))
    return sorted(requests, key=lambda each: each.at)
