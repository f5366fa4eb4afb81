"""What a client sees of a request: events, in the one form that both protocols render.

Nobody changes an event. Those made for every token are not frozen all the same, as freezing doubles what they
cost to make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from frontend.generation.message_parser import ToolCallDelta


class FinishReason(Enum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TOOL_CALLS = "tool_calls"


@dataclass(slots=True)
class Usage:
    """Token counts so far; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Log probabilities at one position: of the token that is there, and (id, log probability) of the
    likeliest ones, likeliest first. A prompt's first token has no `logprob`, as nothing comes before it."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class PromptRead:
    """The prompt, before anything else of its completions, for requests that want to see it.

    Attributes:
        index: which of the request's prompts.
        token_ids: its tokens.
        text: its text, with echo.
        offsets: where in the text each token begins, with echo.
        logprobs: one entry for each token, if they were asked for, else none.
    """

    index: int
    token_ids: Sequence[int]
    text: str
    offsets: Sequence[int]
    logprobs: Sequence[PositionLogprobs]


@dataclass(slots=True)
class Delta:
    """What was generated since the delta before.

    Attributes:
        token_ids: may be empty when only held-back text is released.
        text: lags `token_ids` while a character or a possible stop string is incomplete. Without what a
            message parser took for something else.
        logprobs: one entry for each id if they were asked for, else none.
        usage: counts of this completion so far.
        index: which of the request's completions, all of the first prompt before those of the second.
        reasoning, tool_calls: what a message parser found.
    """

    token_ids: list[int]
    text: str
    logprobs: list[PositionLogprobs]
    usage: Usage
    index: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one completion. `stop_string` or `stop_token_id` is set if one of those, and not the model's
    own end-of-sequence token, was the reason. `score` is the completion's log probability, or a beam's
    score, where completions were ranked by it."""

    reason: FinishReason
    usage: Usage
    stop_string: str | None = None
    stop_token_id: int | None = None
    index: int = 0
    score: float | None = None

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or the stop token's id, whichever it was."""
        return self.stop_token_id if self.stop_string is None else self.stop_string


Event = PromptRead | Delta | Finished
