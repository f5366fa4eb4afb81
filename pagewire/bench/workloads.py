"""What a benchmark asks of the engine: how many requests, how long, and what they share."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pagewire.base.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts drawn uniformly, `shortest` and `longest` included."""

    shortest: int
    longest: int

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """From "128" (all the same) or "128:1024".

        Raises:
            ConfigError: it is neither, or not at least 1.
        """
        first, colon, last = text.partition(":")
        try:
            lengths = cls(int(first), int(last) if colon else int(first))
        except ValueError:
            lengths = cls(0, 0)
        if not 1 <= lengths.shortest <= lengths.longest:
            raise ConfigError(
                f"{option} is {text!r}; it must be a number of tokens, or a range such as 128:1024",
                param=option,
            )
        return lengths

    def draw(self, generator: random.Random, count: int) -> list[int]:
        """`count` lengths."""
        return [generator.randrange(self.shortest, self.longest + 1) for _ in range(count)]

    def __str__(self) -> str:
        return str(self.shortest) if self.shortest == self.longest else f"{self.shortest}:{self.longest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests that are all there at once.

    Attributes:
        name: what people call it.
        prompt, output: tokens of each request's own.
        shared_prefix: tokens that every prompt begins with, before its own.
        prefix_caching: whether the engine may share their KV.
        seed: of the lengths.
    """

    name: str
    num_requests: int
    prompt: Lengths
    output: Lengths
    shared_prefix: int = 0
    prefix_caching: bool = False
    seed: int = 2

    @property
    def counts_input(self) -> bool:
        """Whether its figure is prompt tokens a second: nothing but the first token is generated."""
        return self.output.longest == 1

    @property
    def longest(self) -> int:
        """The most tokens that one of its requests can have, prompt and output together."""
        return self.shared_prefix + self.prompt.longest + self.output.longest

    def lengths(self) -> list[tuple[int, int]]:
        """Own prompt tokens and output tokens of each request; all prompts are drawn before all outputs."""
        generator = random.Random(self.seed)
        prompts = self.prompt.draw(generator, self.num_requests)
        return list(zip(prompts, self.output.draw(generator, self.num_requests), strict=True))

    def prompts(self, vocab_size: int, round_: int) -> list[list[int]]:
        """Token ids of each prompt. Those of another round share nothing with them."""
        generator = random.Random(f"{self.name} {self.seed} {round_}")
        vocabulary = range(vocab_size)
        shared = generator.choices(vocabulary, k=self.shared_prefix)
        return [shared + generator.choices(vocabulary, k=length) for length, _ in self.lengths()]

    def __str__(self) -> str:
        prompt = f"({self.shared_prefix} shared + {self.prompt})" if self.shared_prefix else f"{self.prompt}"
        return f"{self.num_requests} x {prompt}/{self.output}"


def _fixed(name: str, num_requests: int, prompt: int, output: int) -> Workload:
    return Workload(
        name=name, num_requests=num_requests, prompt=Lengths(prompt, prompt), output=Lengths(output, output)
    )


WARM_UP = _fixed("warm-up", 32, 128, 32)

NAMED = {
    workload.name: workload
    for workload in (
        _fixed("W1", 256, 128, 512),
        Workload(name="W2", num_requests=512, prompt=Lengths(128, 1024), output=Lengths(64, 512), seed=2),
        _fixed("W3", 1, 128, 256),
        _fixed("W3b", 16, 128, 256),
        _fixed("W4", 64, 2048, 1),
        Workload(
            name="W5",
            num_requests=256,
            prompt=Lengths(64, 64),
            output=Lengths(64, 64),
            shared_prefix=2048,
            prefix_caching=True,
        ),
    )
}


def named(names: str) -> list[Workload]:
    """The workloads in a list such as "W1,W3b".

    Raises:
        ConfigError: there is no such workload.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in NAMED]
    if unknown or not chosen:
        raise ConfigError(
            f"workload is {names!r}; it must be one or more of {', '.join(NAMED)}, separated by commas",
            param="workload",
        )
    return [NAMED[name] for name in dict.fromkeys(chosen)]
