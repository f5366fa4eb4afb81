"""Beam search: which continuations to follow, and when to stop. Pure: it is told log probabilities.

The algorithm and its results are those of transformers' `generate(num_beams=..., do_sample=False)`
(GenerationMixin._beam_search): of all beams' continuations, those among the likeliest `width` that end are
hypotheses, with the score log probability / length ** length_penalty, and the likeliest `width` that do not
end go on. The search is over when no running beam, judged at its present length, can beat the worst of
`width` hypotheses.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from pagewire.wire.sampling_params import MAX_LOGPROBS, SamplingParams

Candidates = Sequence[tuple[int, float]]
"""(token id, log probability) of the likeliest next tokens, likeliest first."""


@dataclass(frozen=True, slots=True)
class Beam:
    """A sequence that is followed.

    Attributes:
        token_ids: what was generated.
        logprob: the sum of its tokens' log probabilities.
        steps: for each token its log probability, and the candidates that it was chosen from.
    """

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    steps: tuple[tuple[float, Candidates], ...] = ()


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sequence that is complete."""

    beam: Beam
    score: float
    stopped: bool
    """Whether a stop token ended it; otherwise it is as long as it may be."""


class BeamSearcher:
    """One prompt's search.

    Attributes:
        beams: to be continued, the likeliest first; what `advance` wants candidates for.
        is_over: whether the search has ended.
        num_candidates: how many candidates `advance` needs for each beam: `width` that go on, and as many as
            can end. (More than MAX_LOGPROBS cannot be had; that matters only where most of the likeliest
            tokens are stop tokens.)
    """

    def __init__(self, sampling: SamplingParams, *, eos_token_ids: Set[int], max_tokens: int) -> None:
        """Args:
        sampling: whose `beam_search` is set.
        eos_token_ids: the model's.
        max_tokens: the most tokens to generate.
        """
        assert sampling.beam_search is not None
        self._settings = sampling.beam_search
        self._width = self._settings.width or sampling.n
        self._min_tokens = sampling.min_tokens
        self._max_tokens = max_tokens
        eos = frozenset() if sampling.ignore_eos else eos_token_ids
        self._stop_token_ids = frozenset(sampling.stop_token_ids) | eos
        self._length = 0
        self._done: list[Hypothesis] = []
        self.beams = [Beam()]
        self.is_over = False
        self.num_candidates = min(self._width + len(self._stop_token_ids), MAX_LOGPROBS)

    @property
    def best(self) -> Sequence[Hypothesis]:
        """The hypotheses, best first; once the search is over there are `width`."""
        return self._done

    def advance(self, candidates: Sequence[Candidates]) -> None:
        """Takes each beam's candidates for its next token and chooses the next beams."""
        assert not self.is_over
        assert len(candidates) == len(self.beams)
        self._length += 1
        ranked = self._ranked(candidates)
        ended = [beam for beam in ranked[: self._width] if self._ends(beam)]
        self.beams = [beam for beam in ranked if not self._ends(beam)][: self._width]
        self._done = sorted(
            self._done + [self._hypothesis(beam) for beam in ended], key=lambda each: -each.score
        )[: self._width]
        self.is_over = not self.beams or self._is_decided()

    def _ranked(self, candidates: Sequence[Candidates]) -> list[Beam]:
        grown = [
            (beam.logprob + logprob, beam, token_id, logprob, given)
            for beam, given in zip(self.beams, candidates, strict=True)
            for token_id, logprob in given
            if self._length >= self._min_tokens or token_id not in self._stop_token_ids
        ]
        grown.sort(key=lambda each: -each[0])
        return [
            Beam((*beam.token_ids, token_id), total, (*beam.steps, (logprob, given)))
            for total, beam, token_id, logprob, given in grown[
                : self._width + len(self.beams) * self._num_ends
            ]
        ]

    @property
    def _num_ends(self) -> int:
        """The most continuations of one beam that can end."""
        return max(1, len(self._stop_token_ids))

    def _ends(self, beam: Beam) -> bool:
        return self._length == self._max_tokens or beam.token_ids[-1] in self._stop_token_ids

    def _hypothesis(self, beam: Beam) -> Hypothesis:
        return Hypothesis(beam, self._score(beam), beam.token_ids[-1] in self._stop_token_ids)

    def _score(self, beam: Beam) -> float:
        return float(beam.logprob / self._length**self._settings.length_penalty)

    def _is_decided(self) -> bool:
        """Whether nothing better is to be expected."""
        if len(self._done) < self._width:
            return False
        return self._settings.early_stopping or self._score(self.beams[0]) <= self._done[-1].score
