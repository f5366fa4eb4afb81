"""What a scheduler tells workers of adapters, and they it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from engine.dispatch.sampling import RecordError

# Of the longest path and name that a command may carry, and what is around them.
MAX_COMMAND_BYTES = 8192
KINDS = ("load", "place", "retire", "drop")


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """An adapter that a worker has.

    Attributes:
        adapter_id: derived from its name and its files, so that all ranks and replicas, and a scheduler that
            is started again, agree on it.
        name: what requests call it.
        path: its directory.
        digest: of its files, 64 hexadecimal digits; "" if nobody looks at it.
        retired: whether only requests that are under way may have it.
    """

    adapter_id: int
    name: str
    path: str
    digest: str = ""
    retired: bool = False


@dataclass(frozen=True, slots=True)
class AdapterCommand:
    """One piece of work with an adapter. It is repeated until a worker's answer says that no more is left.

    Attributes:
        kind: "load": read it and check that it fits the model; "place": copy it into a slot, which no request
            uses; "retire": note that only requests under way have it; "drop": forget it.
        facts: which one.
        slot: to place it in.
    """

    kind: str
    facts: AdapterFacts
    slot: int = -1

    @property
    def adapter_id(self) -> int:
        """The adapter's."""
        return self.facts.adapter_id

    def encode(self) -> bytes:
        """Its bytes in a plan, padded to whole words."""
        data = json.dumps(asdict(self)).encode()
        assert len(data) <= MAX_COMMAND_BYTES, "names and paths are checked when they come"
        return data + b" " * (-len(data) % 4)

    @classmethod
    def decode(cls, data: bytes) -> AdapterCommand:
        """Raises:
        RecordError: the bytes are no command.
        """
        try:
            values = json.loads(data)
            facts = AdapterFacts(**values.pop("facts"))
            command = cls(facts=facts, **values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecordError(f"a malformed adapter command: {error}") from error
        if command.kind not in KINDS:
            raise RecordError(f"an adapter command of kind {command.kind!r}")
        return command
