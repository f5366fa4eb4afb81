"""Requests that are answered from pooled states instead of by generating: what embeddings, classifications
and scores have in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from frontend.generation.events import Usage
from frontend.generation.open_request import OpenRequest, Submission, Wakeup
from frontend.generation.pipeline import Admitted, GenerationPipeline
from frontend.generation.request import INT32_RANGE, TextPrompt, TokenPrompt, require_at_most
from frontend.generation.submissions import check_range
from frontend.replicas.links import SchedulerLinks
from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import InvalidRequest, PagewireError, Unavailable
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2
from pagewire.wire.ended_messages import error_in

MAX_INPUTS = 2048
"""The most inputs of one request, as with OpenAI."""

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPair:
    """Two texts as one input, such as a query and a document."""

    first: str
    second: str


Input = TextPrompt | TokenPrompt | TextPair
InputT = TypeVar("InputT", bound=Input)


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledRequest(Generic[InputT]):
    """Inputs that are each computed by itself, checked as far as that is possible without the model.

    Attributes:
        request_id: the public id, as `check_request_id` returned it.
        model: the name asked for; empty means the server's only model.
        inputs: what to compute.
        truncate_prompt_tokens: how many tokens of each input are kept, from its beginning; -1 keeps what the
            model takes, None refuses longer ones.
        priority: lower goes first.
        client: whose it is; see frontend/caller.py.
        timeout: seconds from now until the request is ended, or None.

    Raises:
        InvalidRequest: a value is out of its range.
    """

    request_id: str
    model: str
    inputs: Sequence[InputT]
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    client: str = ""
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.inputs) <= MAX_INPUTS:
            raise InvalidRequest(
                f"input is a list of {len(self.inputs)} inputs; it must have 1 to {MAX_INPUTS}", param="input"
            )
        kept = self.truncate_prompt_tokens
        if kept is not None and kept != -1 and kept < 1:
            raise InvalidRequest(
                f"truncate_prompt_tokens is {kept}; it must be at least 1, or -1 for what the model takes",
                param="truncate_prompt_tokens",
            )
        if self.priority not in INT32_RANGE:
            raise InvalidRequest(
                f"priority is {self.priority}; it must be a signed 32-bit integer", param="priority"
            )
        if self.timeout is not None and not self.timeout < float("inf"):
            raise InvalidRequest(
                f"timeout is {self.timeout}; it must be a finite number of seconds", param="timeout"
            )

    def num_kept(self, limit: int) -> int | None:
        """How many tokens of each input are kept, where at most `limit` are taken; None for all.

        Raises:
            InvalidRequest: more are asked for than are taken.
        """
        kept = limit if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens
        if kept is not None and kept > limit:
            raise InvalidRequest(
                f"truncate_prompt_tokens is {kept}; at most {limit} tokens are taken",
                param="truncate_prompt_tokens",
            )
        return kept


def inputs_of(
    given: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]], *, add_special_tokens: bool
) -> list[TextPrompt | TokenPrompt]:
    """The inputs of a request that is one text, the token ids of one, or a list of either.

    Raises:
        InvalidRequest: there are more than MAX_INPUTS.
    """
    if isinstance(given, str):
        return [TextPrompt(text=given, add_special_tokens=add_special_tokens)]
    if given and isinstance(given[0], int):
        return [TokenPrompt(token_ids=given)]  # type: ignore[arg-type]
    require_at_most(MAX_INPUTS, len(given), "input")
    return [
        TextPrompt(text=each, add_special_tokens=add_special_tokens)
        if isinstance(each, str)
        else TokenPrompt(token_ids=each)  # type: ignore[arg-type]
        for each in given
    ]


def read_inputs(
    tokenizer: TextTokenizer, request: PooledRequest[InputT], limit: int, vocab_size: int
) -> list[Sequence[int]]:
    """Every input's tokens. Slow: runs in a thread.

    Args:
        limit: the most tokens of an input.

    Raises:
        InvalidRequest: one is empty, too long or has tokens that the model does not have.
    """
    kept = request.num_kept(limit)
    read: list[Sequence[int]] = []
    for number, prompt in enumerate(request.inputs):
        name = "input" if len(request.inputs) == 1 else f"input[{number}]"
        ids = _tokens(tokenizer, prompt, limit, kept, name)
        check_tokens(ids, limit, vocab_size, name)
        read.append(ids)
    return read


def check_tokens(ids: Sequence[int], limit: int, vocab_size: int, name: str) -> None:
    """Checks an input's tokens.

    Raises:
        InvalidRequest: there are none or too many, or the model does not have one; the input has this name.
    """
    if not ids:
        raise InvalidRequest(f"{name} is empty; it must have at least one token", param=name)
    if len(ids) > limit:
        raise InvalidRequest(
            f"{name} has {len(ids)} tokens; at most {limit} are taken. Send less of it, or set "
            "truncate_prompt_tokens",
            param=name,
        )
    check_range(ids, vocab_size, name)


def require_fitting(text: str, limit: int, tokenizer: TextTokenizer, name: str) -> None:
    """Refuses a text that has too many tokens even if each were the longest there is, without reading it.

    Raises:
        InvalidRequest: it has.
    """
    if len(text) > limit * tokenizer.longest_token:
        raise InvalidRequest(
            f"{name} has {len(text)} characters, which is more than {limit} tokens can hold", param=name
        )


def _tokens(
    tokenizer: TextTokenizer, prompt: Input, limit: int, kept: int | None, name: str
) -> Sequence[int]:
    if isinstance(prompt, TokenPrompt):
        return prompt.token_ids if kept is None else prompt.token_ids[:kept]
    texts = [prompt.text] if isinstance(prompt, TextPrompt) else [prompt.first, prompt.second]
    if kept is None:
        for text in texts:
            require_fitting(text, limit, tokenizer, name)
    else:
        texts = [text[: kept * tokenizer.longest_token] for text in texts]
    if isinstance(prompt, TextPair):
        ids, added = tokenizer.encode_pair_marked(*texts)
    else:
        ids, added = tokenizer.encode_marked(texts[0], add_special_tokens=prompt.add_special_tokens)
    if kept is None or len(ids) <= kept:
        return ids
    # What the tokenizer adds around a text, such as the token whose state is the vector, is never cut off.
    surplus = len(ids) - kept
    written = [place for place, is_added in enumerate(added) if not is_added]
    dropped = frozenset(written[-surplus:])
    return [token_id for place, token_id in enumerate(ids) if place not in dropped][:kept]


async def pool(
    pipeline: GenerationPipeline,
    admitted: Admitted,
    request: PooledRequest[InputT],
    token_ids: Sequence[Sequence[int]],
    pooling: inference_pb2.Pooling,
) -> tuple[list[Vector], Usage]:
    """Has every input computed, many at once. Returns the pooled states, or what the model's head makes of
    them, and the counts of all inputs together.

    Raises:
        PagewireError: one failed; the others are aborted.
    """
    submissions = [
        Submission(
            request_id=f"{request.request_id}-{number}" if number else request.request_id,
            prompt_ids=ids,
            sampling=inference_pb2.SamplingParams(max_tokens=1),
            priority=request.priority,
            client=request.client,
            deadline=admitted.deadline,
            pooling=pooling,
            part=number,
            adapter_id=admitted.adapter_id,
        )
        for number, ids in enumerate(token_ids)
    ]
    ended = await run_all(pipeline.link, submissions, at_once(admitted))
    return [_state(each) for each in ended], usage_of(ended)


def at_once(admitted: Admitted) -> int:
    """How many parts of a request are submitted at a time, so that none is refused for a full queue."""
    return 2 * max(admitted.facts.max_num_seqs, 1)


def usage_of(ended: Sequence[OpenRequest]) -> Usage:
    """The counts of requests that have ended, together."""
    return Usage(
        sum(len(each.prompt_ids) for each in ended), sum(each.num_cached_tokens or 0 for each in ended), 0
    )


async def run_all(link: SchedulerLinks, submissions: Sequence[Submission], at_once: int) -> list[OpenRequest]:
    """Submits everything, at most `at_once` at a time, and returns the requests in order, all ended well.

    Raises:
        PagewireError: one failed; the others are aborted.
    """
    wakeup = Wakeup()
    waiting = deque(submissions)
    opened: list[OpenRequest] = []
    running: list[OpenRequest] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(link.open(waiting.popleft(), wakeup))
                opened.append(running[-1])
            await wakeup.wait()
            for request in running:
                _check_end(request)
            running = [request for request in running if request.ended is None]
        return opened
    finally:
        for request in running:
            link.close(request)


def _check_end(request: OpenRequest) -> None:
    ended = request.ended
    if ended is None:
        return
    if ended.reason == scheduler_pb2.END_REASON_ERROR:
        raise error_in(ended)
    if ended.reason == scheduler_pb2.END_REASON_ABORT:
        raise Unavailable("this server is shutting down; send the request again")


def _state(request: OpenRequest) -> Vector:
    if request.pooled is None:
        raise PagewireError("the scheduler ended a request with pooling without its hidden state")
    state = np.array(request.pooled, dtype=np.float32)
    if not np.isfinite(state).all():
        raise PagewireError("the model's hidden state has numbers that are not finite")
    return state
