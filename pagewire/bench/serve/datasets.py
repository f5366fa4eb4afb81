"""What is asked: synthetic requests, those of a file of conversations, or those of a trace.

A dataset gives the same request for the same run and index in whichever process it is asked, so that
processes can share a run without telling each other anything. Lengths come from the seed alone: points of a
sweep, and measurements of different servers, ask for the same. Contents are new in every run, lest a server
answer from what it has cached of an earlier one.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

from pagewire.bench.serve.prompts import PromptMaker
from pagewire.bench.workloads import Lengths


@dataclass(frozen=True, slots=True)
class Ask:
    """A request before it is written for a protocol.

    Attributes:
        prompt: token ids or text.
        prompt_len: its tokens, as far as they are known.
        output_len: tokens to generate.
    """

    prompt: list[int] | str
    prompt_len: int
    output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset(ABC):
    """Requests by number.

    Attributes:
        maker: writes prompts.
        seed: of lengths, and of which requests share what.
        contents: of tokens; no two measurements have the same.
    """

    maker: PromptMaker
    seed: int = 0
    contents: str = ""

    @property
    def size(self) -> int | None:
        """Requests that it has; None if it can make any number."""
        return None

    @abstractmethod
    def ask(self, run: str, index: int) -> Ask:
        """The request of an index; another run's have other contents."""

    def _seeded(self, *key: object) -> random.Random:
        return random.Random(f"{self.seed} {key}")

    def _tokens(self, count: int, *key: object) -> list[int]:
        """Tokens that are the same for the same key, within this measurement."""
        return self.maker.token_ids(random.Random(f"{self.contents} {self.seed} {key}"), count)

    def _ask(self, token_ids: list[int], output_len: int) -> Ask:
        return Ask(self.maker.prompt(token_ids), len(token_ids), output_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomDataset(Dataset):
    """Tokens at random; with prefixes, each begins with one of them.

    Attributes:
        input, output: tokens; the input's own, behind a prefix.
        prefix_len: tokens of a prefix.
        num_prefixes: how many there are.
    """

    input: Lengths
    output: Lengths
    prefix_len: int = 0
    num_prefixes: int = 1

    def ask(self, run: str, index: int) -> Ask:
        """See Dataset."""
        generator = self._seeded(index)
        [input_len], [output_len] = self.input.draw(generator, 1), self.output.draw(generator, 1)
        own = self._tokens(input_len, run, index)
        if not self.prefix_len:
            return self._ask(own, output_len)
        chosen = generator.randrange(self.num_prefixes)
        return self._ask(self._tokens(self.prefix_len, run, "prefix", chosen) + own, output_len)

    def __str__(self) -> str:
        if not self.prefix_len:
            return f"{self.input}/{self.output}"
        return f"({self.num_prefixes} prefixes of {self.prefix_len} + {self.input})/{self.output}"


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Lengths whose logarithm is normal.

    Attributes:
        mean: of the lengths.
        sigma: standard deviation of their logarithm.
        longest: longer ones are drawn again.
    """

    mean: float
    sigma: float
    longest: int

    def draw(self, generator: random.Random) -> int:
        """A length, at least 1."""
        location = math.log(self.mean) - self.sigma**2 / 2
        while True:
            length = round(generator.lognormvariate(location, self.sigma))
            if length <= self.longest:
                return max(1, length)


# ShareGPT's means are those of Kwon et al., "Efficient Memory Management for Large Language Model Serving
# with PagedAttention" (2023), figure 11: 161.31 tokens in, 337.99 out. The spreads are ours: they make most
# prompts short and a few long, as that figure's histogram shows.
SHAREGPT_INPUT = LogNormal(161.31, 1.2, 1024)
SHAREGPT_OUTPUT = LogNormal(337.99, 0.9, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareGptLike(Dataset):
    """Random tokens in lengths such as people's conversations with ChatGPT have."""

    def ask(self, run: str, index: int) -> Ask:
        """See Dataset."""
        generator = self._seeded(index)
        input_len, output_len = SHAREGPT_INPUT.draw(generator), SHAREGPT_OUTPUT.draw(generator)
        return self._ask(self._tokens(input_len, run, index), output_len)

    def __str__(self) -> str:
        return "lengths like ShareGPT's"
