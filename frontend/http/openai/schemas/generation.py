"""What both generating endpoints take besides the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from frontend.generation.message_parser import NewParser
from frontend.generation.request import Prompt
from frontend.http.body import Body, Seconds, TokenIdList
from frontend.http.openai.schemas.hints import UNSERVED, Hints
from frontend.http.openai.schemas.structured import StructuredFields
from frontend.http.openai.shapes import AnswerOptions
from frontend.served_model import ServedModel
from pagewire.base.errors import InvalidRequest
from pagewire.wire.sampling_params import MAX_BEAMS, BeamSearch

MODELS_OWN_DEFAULTS = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
"""What holds where the model's generation_config.json does not say otherwise."""


class StreamOptions(Body):
    """How a stream is to be."""

    unserved: ClassVar = {"include_obfuscation": (False,)}

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationBody(StructuredFields, Hints):
    """What both generating endpoints take besides the prompt; null means unset, as with OpenAI."""

    unserved: ClassVar = UNSERVED
    defaults: ClassVar = {
        "service_tier": "auto",
        "store": False,
        "stream": False,
        "priority": 0,
        "return_token_ids": False,  # nosec B105 # no password
        "n": 1,
        "use_beam_search": False,
        "length_penalty": 1,
        "early_stopping": False,
        **MODELS_OWN_DEFAULTS,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "min_tokens": 0,
        "ignore_eos": False,
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
    }

    model: str | None = None
    request_id: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    timeout: Seconds | None = None
    cache_salt: str | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
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
    bad_words: Annotated[list[str], Field(fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    """Changes nothing: no tokenizer that is served writes spaces there."""
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: TokenIdList | None = None
    prompt_logprobs: int | None = None

    def prompts_to_continue(self) -> Sequence[Prompt]:
        """The prompts in the pipeline's form.

        Raises:
            InvalidRequest: see the messages.
        """
        return [self.prompt_to_continue()]

    def prompt_to_continue(self) -> Prompt:
        """The prompt, where an endpoint takes only one.

        Raises:
            InvalidRequest: see the messages.
        """
        raise NotImplementedError

    def new_parser(self, model: ServedModel) -> NewParser | None:
        """What reads completions as messages, if they are to be read so."""
        return None

    @property
    def wants_echo(self) -> bool:
        """Whether completions begin with their prompts."""
        return False

    def num_top_logprobs(self) -> int | None:
        """How many alternatives' log probabilities are wanted, None for no log probabilities at all.

        Raises:
            InvalidRequest: the fields contradict each other.
        """
        raise NotImplementedError

    def limit(self) -> int | None:
        """The most tokens to generate, if the client said."""
        return self.max_tokens

    def options(self, *, num_prompts: int) -> AnswerOptions:
        """What the client wants to see.

        Raises:
            InvalidRequest: stream_options without a stream.
        """
        stream = self.stream_options
        if stream is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream: true", param="stream_options")
        per_prompt = 1 if self.n is None else self.n
        return AnswerOptions(
            num_choices=num_prompts * per_prompt,
            choices_per_prompt=per_prompt,
            include_usage=stream is not None and stream.include_usage,
            continuous_usage=stream is not None and stream.continuous_usage_stats,
            echo=self.wants_echo,
            logprobs=self.num_top_logprobs(),
            prompt_logprobs=self.prompt_logprobs,
            return_token_ids=bool(self.return_token_ids),
        )

    def sampling_given(self) -> dict[str, Any]:
        """The sampling parameters that the client set, by SamplingParams field.

        Raises:
            InvalidRequest: the fields contradict each other.
        """
        given = {name: getattr(self, name) for name in _PLAIN_SAMPLING_FIELDS}
        given |= {
            "max_tokens": self.limit(),
            "logprobs": self.num_top_logprobs(),
            "prompt_logprobs": self._num_prompt_logprobs(),
            "structured_output": self.structured_output(),
            "beam_search": self._beam_search(),
        }
        if not self.use_beam_search:
            given["best_of"] = self.best_of
        return {name: value for name, value in given.items() if value is not None}

    def _num_prompt_logprobs(self) -> int | None:
        """An echo with log probabilities has those of the prompt too."""
        echoed = self.num_top_logprobs() if self.wants_echo else None
        wanted = [count for count in (self.prompt_logprobs, echoed) if count is not None]
        return max(wanted) if wanted else None

    def _beam_search(self) -> BeamSearch | None:
        """vLLM's way of asking for it: `n` beams, or as many as `best_of` says."""
        if not self.use_beam_search:
            for name in ("length_penalty", "early_stopping"):
                if getattr(self, name) not in (None, 1.0, False):
                    raise InvalidRequest(f"{name} needs use_beam_search: true", param=name)
            return None
        name = "n" if self.best_of is None else "best_of"
        width = getattr(self, name)
        if width is not None and not 1 <= width <= MAX_BEAMS:
            raise InvalidRequest(
                f"{name} is {width}; with beam search it must be between 1 and {MAX_BEAMS}", param=name
            )
        return BeamSearch(
            width=width,
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
            early_stopping=bool(self.early_stopping),
        )


_PLAIN_SAMPLING_FIELDS = (
    "n",
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
    "bad_words",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "logit_bias",
    "allowed_token_ids",
)
