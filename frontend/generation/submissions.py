"""What one answer has open at the scheduler, and how a client's parameters are put to it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from frontend.generation.open_request import OpenRequest, Submission, Wakeup
from frontend.generation.request import GenerationRequest
from frontend.replicas.links import SchedulerLinks
from pagewire.base.errors import InvalidRequest
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2
from pagewire.wire.sampling_messages import to_message
from pagewire.wire.sampling_params import SamplingParams, seed_of_completion

_SCHEDULERS_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "logit_bias",
    "allowed_token_ids",
    "prompt_logprobs",
    "structured_output",
)


class Submissions:
    """Owns an answer's open requests: whoever makes it calls `close_all` when the answer is over.

    Attributes:
        first: the first request that was opened, once one was.
    """

    def __init__(
        self,
        link: SchedulerLinks,
        request: GenerationRequest,
        *,
        deadline: float | None,
        bad_words: Sequence[Sequence[int]],
        adapter_id: int = 0,
    ) -> None:
        self._link = link
        self._request = request
        self._deadline = deadline
        self._bad_words = bad_words
        self._adapter_id = adapter_id
        self._open: dict[OpenRequest, None] = {}
        self._num_submitted = 0
        self.first: OpenRequest | None = None

    def open(
        self, prompt_ids: Sequence[int], sampling: inference_pb2.SamplingParams, wakeup: Wakeup
    ) -> OpenRequest:
        """Submits a part of the answer. In logs, all but the first have a number behind the request's id.

        Raises:
            Unavailable, Overloaded: see `SchedulerLinks.open`.
        """
        request_id = self._request.request_id
        number, self._num_submitted = self._num_submitted, self._num_submitted + 1
        opened = self._link.open(
            Submission(
                request_id=f"{request_id}-{number}" if number else request_id,
                prompt_ids=prompt_ids,
                sampling=sampling,
                priority=self._request.priority,
                client=self._request.client,
                deadline=self._deadline,
                cache_salt=self._request.cache_salt,
                bad_words=self._bad_words,
                part=number,
                adapter_id=self._adapter_id,
            ),
            wakeup,
            beside=self.first,
        )
        self._open[opened] = None
        if self.first is None:
            self.first = opened
        return opened

    def close(self, request: OpenRequest) -> None:
        """Ends the interest in one of them."""
        self._open.pop(request, None)
        self._link.close(request)

    def close_all(self) -> None:
        """Aborts what is still open."""
        for request in list(self._open):
            self.close(request)


def to_submit(
    sampling: SamplingParams, prompt_ids: Sequence[int], facts: scheduler_pb2.GetModelResponse
) -> inference_pb2.SamplingParams:
    """Checks a request against the model and resolves what was left open: the seed and max_tokens.

    Raises:
        InvalidRequest: see the messages.
    """
    if not prompt_ids:
        raise InvalidRequest("the prompt is empty; it must have at least one token", param="prompt")
    room = facts.max_model_len - len(prompt_ids)
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {len(prompt_ids)} tokens; at most {facts.max_model_len - 1} fit, as the model's "
            f"context is {facts.max_model_len} tokens and one is needed for the completion",
            param="prompt",
        )
    check_range(prompt_ids, facts.vocab_size, "prompt")
    sampling.check_token_ids(facts.vocab_size)
    max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    if sampling.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {sampling.min_tokens}; after a prompt of {len(prompt_ids)} tokens at most "
            f"{max_tokens} can be generated",
            param="min_tokens",
        )
    resolved = to_message(sampling, _SCHEDULERS_FIELDS)
    resolved.seed = random.getrandbits(63) if sampling.seed is None else sampling.seed
    resolved.max_tokens = max(max_tokens, 1)  # reading a prompt samples a token, which nobody takes
    _check_single_precision(sampling, resolved)
    return resolved


def for_choice(first: inference_pb2.SamplingParams, number: int) -> inference_pb2.SamplingParams:
    """The parameters of a prompt's next completions: another seed, and the prompt was read by the first."""
    if number == 0:
        return first
    other = inference_pb2.SamplingParams()
    other.CopyFrom(first)
    other.seed = seed_of_completion(first.seed, number)
    other.ClearField("prompt_logprobs")
    return other


def check_range(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Refuses ids that the model does not have.

    Raises:
        InvalidRequest: naming the first.
    """
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(
            f"{param} has token id {wrong}; ids must be between 0 and {vocab_size - 1}", param=param
        )


def _check_single_precision(sampling: SamplingParams, resolved: inference_pb2.SamplingParams) -> None:
    """Refuses values that are in range but not once they are rounded to the wire's 32-bit floats."""
    for name in ("temperature", "top_p", "repetition_penalty"):
        given, rounded = getattr(sampling, name), getattr(resolved, name)
        if math.isinf(rounded) or (rounded == 0 and given > 0 and name != "temperature"):
            raise InvalidRequest(f"{name} is {given}; it must fit a 32-bit float", param=name)
