"""From inputs to vectors: tokenize, submit, and scale the hidden states that come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from frontend.generation.events import Usage
from frontend.generation.open_request import OpenRequest, Submission, Wakeup
from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import INT32_RANGE, TextPrompt, TokenPrompt
from frontend.generation.submissions import check_range
from frontend.scheduler_link import SchedulerLink
from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import InvalidRequest, PagewireError, Unavailable
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2
from pagewire.wire.ended_messages import error_in

MAX_INPUTS = 2048
"""The most inputs of one request, as with OpenAI."""

_LEAST_LENGTH = 1e-12
"""What a vector's length is taken for if it is less, so that nothing is divided by zero."""

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """Inputs to embed, checked as far as that is possible without the model.

    Attributes:
        request_id: the public id, as `check_request_id` returned it.
        model: the name asked for; empty means the server's only model.
        inputs: what to embed, each by itself.
        pooling: "last", "mean" or "cls", or None for the model's own way.
        normalize: whether vectors are scaled to length 1, or None for the model's own way.
        dimensions: how many numbers of each vector are kept, from its beginning; None keeps all.
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
    inputs: Sequence[TextPrompt | TokenPrompt]
    pooling: str | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    client: str = ""
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.inputs) <= MAX_INPUTS:
            raise InvalidRequest(
                f"input is a list of {len(self.inputs)} inputs; it must have 1 to {MAX_INPUTS}", param="input"
            )
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidRequest(
                f"dimensions is {self.dimensions}; it must be at least 1", param="dimensions"
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


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector for each input, in order, and counts of all inputs together."""

    vectors: list[Vector]
    usage: Usage


async def embed(pipeline: GenerationPipeline, request: EmbeddingRequest) -> Embeddings:
    """Embeds a request's inputs, many at once.

    Raises:
        InvalidRequest, NotFound: the request cannot succeed as sent.
        Unavailable: no engine is ready, or this frontend is draining.
        Overloaded: too much is waiting.
        DeadlineExceeded: the timeout is over.
    """
    async with pipeline.admit(request.model, request.timeout) as admitted:
        own = pipeline.model.embedding
        pooling = own.choose(request.pooling)
        facts = admitted.facts
        if request.dimensions is not None and request.dimensions > facts.hidden_size:
            raise InvalidRequest(
                f"dimensions is {request.dimensions}; this model's vectors have {facts.hidden_size} numbers",
                param="dimensions",
            )
        limit = min(filter(None, (facts.max_model_len, own.max_tokens, pipeline.max_prompt_tokens)))
        token_ids = await admitted.in_time(
            pipeline.in_thread(_read, pipeline.model.tokenizer, request, limit, facts.vocab_size)
        )
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
            )
            for number, ids in enumerate(token_ids)
        ]
        at_once = 2 * max(facts.max_num_seqs, 1)
        ended = await _pool_all(pipeline.link, submissions, at_once)
        normalize = own.normalize if request.normalize is None else request.normalize
        vectors = [_vector(each, request.dimensions, normalize=normalize) for each in ended]
        admitted.outcome = "embedded"
        return Embeddings(
            vectors, Usage(sum(map(len, token_ids)), sum(each.num_cached_tokens or 0 for each in ended), 0)
        )


def _read(
    tokenizer: TextTokenizer, request: EmbeddingRequest, limit: int, vocab_size: int
) -> list[Sequence[int]]:
    """Every input's tokens. Slow: runs in a thread.

    Raises:
        InvalidRequest: one is empty, too long or has tokens that the model does not have.
    """
    kept = limit if request.truncate_prompt_tokens == -1 else request.truncate_prompt_tokens
    if kept is not None and kept > limit:
        raise InvalidRequest(
            f"truncate_prompt_tokens is {kept}; at most {limit} tokens are taken",
            param="truncate_prompt_tokens",
        )
    read: list[Sequence[int]] = []
    for number, prompt in enumerate(request.inputs):
        name = "input" if len(request.inputs) == 1 else f"input[{number}]"
        ids = _tokens(tokenizer, prompt, limit, kept, name)
        if not ids:
            raise InvalidRequest(f"{name} is empty; it must have at least one token", param=name)
        if len(ids) > limit:
            raise InvalidRequest(
                f"{name} has {len(ids)} tokens; at most {limit} are taken. Send less of it, or set "
                "truncate_prompt_tokens",
                param=name,
            )
        check_range(ids, vocab_size, name)
        read.append(ids)
    return read


def _tokens(
    tokenizer: TextTokenizer, prompt: TextPrompt | TokenPrompt, limit: int, kept: int | None, name: str
) -> Sequence[int]:
    if isinstance(prompt, TokenPrompt):
        return prompt.token_ids if kept is None else prompt.token_ids[:kept]
    if len(prompt.text) > limit * tokenizer.longest_token:
        if kept is None:
            raise InvalidRequest(
                f"{name} has {len(prompt.text)} characters, which is more than {limit} tokens can hold",
                param=name,
            )
        prompt = TextPrompt(
            text=prompt.text[: kept * tokenizer.longest_token], add_special_tokens=prompt.add_special_tokens
        )
    ids, added = tokenizer.encode_marked(prompt.text, add_special_tokens=prompt.add_special_tokens)
    if kept is None or len(ids) <= kept:
        return ids
    # What the tokenizer adds around a text, such as the token whose state is the vector, is never cut off.
    surplus = len(ids) - kept
    written = [place for place, is_added in enumerate(added) if not is_added]
    dropped = frozenset(written[-surplus:])
    return [token_id for place, token_id in enumerate(ids) if place not in dropped][:kept]


async def _pool_all(
    link: SchedulerLink, submissions: Sequence[Submission], at_once: int
) -> list[OpenRequest]:
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
    if request.pooled is None:
        raise PagewireError("the scheduler ended an embedding without its hidden state")


def _vector(request: OpenRequest, dimensions: int | None, *, normalize: bool) -> Vector:
    assert request.pooled is not None
    vector = np.array(request.pooled, dtype=np.float32)[:dimensions]
    if not np.isfinite(vector).all():
        raise PagewireError("the model's hidden state has numbers that are not finite")
    if normalize:
        vector = vector / max(float(np.linalg.norm(vector)), _LEAST_LENGTH)
    return vector.astype(np.float32, copy=False)
