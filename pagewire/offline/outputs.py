"""What `LLM` returns."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class TokenLogprobs:
    """Log probabilities at one position.

    Attributes:
        logprob: of the token that is there.
        top: token id -> log probability of the likeliest tokens, likeliest first.
    """

    logprob: float
    top: dict[int, float]


@dataclass(slots=True)
class CompletionOutput:
    """One completion.

    Attributes:
        text: the generated text.
        token_ids: the generated ids.
        finish_reason: "stop" or "length"; None while it is generated.
        stop_reason: the stop string or stop token id that ended it, unless it was the model's own end.
        logprobs: one entry for each id, if asked for.
        index: its place among the completions of the prompt.
        score: with best_of the sum of its log probabilities, with beam search the beam's score.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    index: int = 0
    score: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """What came of one prompt.

    Attributes:
        request_id: its name in logs.
        prompt: as text; None if it was given as ids.
        prompt_token_ids: as ids.
        outputs: its completions.
        num_cached_tokens: prompt tokens found in the prefix cache, by the first of its completions.
        prompt_logprobs: one entry for each prompt token, if asked for; None for the first.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(slots=True)
class StreamOutput:
    """More of a completion, from `LLM.stream`.

    Attributes:
        prompt_index: which of the prompts, or conversations, it belongs to.
        index: which of that prompt's completions.
        text: newly completed text. It lags the ids while a character or a possible stop string is incomplete.
        token_ids: newly generated ids.
        finish_reason: "stop" or "length" with the last piece of a completion; None before.
        output: with the last piece of a prompt, everything that came of it.
    """

    prompt_index: int
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    output: RequestOutput | None


@dataclass(slots=True)
class ClassificationOutput:
    """What a classifier says of one text.

    Attributes:
        label: the likeliest class.
        probs: a probability, or the logit, of each class of `LLM.labels`, in their order.
    """

    label: str
    probs: list[float]
