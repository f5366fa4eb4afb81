"""What both generating endpoints take besides the prompt."""

from __future__ import annotations

from typing import Any

from frontend.generation_request import Prompt
from frontend.http.schemas.base import Body, TokenIdList
from pagewire.errors import InvalidRequest


class StreamOptions(Body):
    """How a stream is to be."""

    include_usage: bool = False


class GenerationBody(Body):
    """What both generating endpoints take besides the prompt; null means unset, as with OpenAI."""

    model: str | None = None
    request_id: str | None = None
    user: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    timeout: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIdList | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: TokenIdList | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the token counts.

        Raises:
            InvalidRequest: stream_options without a stream.
        """
        if self.stream_options is None:
            return False
        if not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream: true", param="stream_options")
        return self.stream_options.include_usage

    def prompt_to_continue(self) -> Prompt:
        """The prompt in the pipeline's form.

        Raises:
            InvalidRequest: see the messages.
        """
        raise NotImplementedError

    def num_top_logprobs(self) -> int | None:
        """How many alternatives' log probabilities are wanted, None for no log probabilities at all.

        Raises:
            InvalidRequest: the fields contradict each other.
        """
        raise NotImplementedError

    def limit(self) -> int | None:
        """The most tokens to generate, if the client said."""
        return self.max_tokens

    def sampling_given(self) -> dict[str, Any]:
        """The sampling parameters that the client set, by SamplingParams field.

        Raises:
            InvalidRequest: the fields contradict each other.
        """
        given = {name: getattr(self, name) for name in _PLAIN_SAMPLING_FIELDS}
        given |= {"max_tokens": self.limit(), "logprobs": self.num_top_logprobs()}
        return {name: value for name, value in given.items() if value is not None}


_PLAIN_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "logit_bias",
    "allowed_token_ids",
)
