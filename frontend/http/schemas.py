"""What the HTTP endpoints take. Unknown fields are refused, and so are OpenAI's that are not served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from frontend.generation_request import Conversation, Prompt, TextPrompt, TokenPrompt
from pagewire.errors import InvalidRequest, Unsupported

TokenIdList = Annotated[list[int], Field(fail_fast=True)]
TextList = Annotated[list[str], Field(fail_fast=True)]
TokenIdLists = Annotated[list[TokenIdList], Field(fail_fast=True)]

_UNSERVED: Mapping[str, tuple[object, ...]] = {
    # Fields that clients of the field know, with the values that ask for nothing beyond what is served.
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "length_penalty": (1.0,),
    "metadata": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}


class _Body(BaseModel):
    """Strict: "5" is no number and true is no integer. Unknown fields are kept so as to name them."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(_Body):
    """How a stream is to be."""

    include_usage: bool = False


class GenerationBody(_Body):
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


class TextPart(_Body):
    """A piece of a message's content. Only text is served."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn. `content` is text, whole or in parts."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content
        turn = {
            "role": self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }
        if self.name is not None:
            turn["name"] = self.name
        return turn


class ChatCompletionBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message]
    add_generation_prompt: bool = True
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def prompt_to_continue(self) -> Prompt:
        return conversation(self.messages, self.add_generation_prompt)

    def limit(self) -> int | None:
        if self.max_completion_tokens is None:
            return self.max_tokens
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise InvalidRequest(
                "max_tokens and max_completion_tokens differ; send max_completion_tokens only",
                param="max_tokens",
            )
        return self.max_completion_tokens

    def num_top_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs is not None:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: (
        str
        | TokenIdList
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[TokenIdList], Field(fail_fast=True)]
    )
    add_special_tokens: bool = True
    logprobs: int | None = None

    def prompt_to_continue(self) -> Prompt:
        prompt = self.prompt
        if isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], int)):
            if len(prompt) != 1:
                raise InvalidRequest(
                    f"prompt is a list of {len(prompt)} prompts; it must have one: send a request for each",
                    param="prompt",
                )
            prompt = prompt[0]  # type: ignore[assignment]
        if isinstance(prompt, str):
            return TextPrompt(text=prompt, add_special_tokens=self.add_special_tokens)
        return TokenPrompt(token_ids=prompt)  # type: ignore[arg-type]

    def num_top_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeBody(_Body):
    """POST /tokenize: `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    def to_tokenize(self) -> TextPrompt | Conversation:
        """The prompt in the pipeline's form.

        Raises:
            InvalidRequest: there is none, or there are two.
        """
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("send either prompt or messages", param="prompt")
        if self.prompt is not None:
            return TextPrompt(text=self.prompt, add_special_tokens=self.add_special_tokens)
        return conversation(self.messages or [], self.add_generation_prompt)


class DetokenizeBody(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIdList
    skip_special_tokens: bool = False


def conversation(messages: Sequence[Message], add_generation_prompt: bool) -> Conversation:
    """Messages in the pipeline's form."""
    return Conversation(
        messages=[message.for_template() for message in messages],
        add_generation_prompt=add_generation_prompt,
    )


BodyT = TypeVar("BodyT", bound=_Body)


def parse(kind: type[BodyT], data: bytes) -> BodyT:
    """Reads a request body.

    Raises:
        InvalidRequest: it is no JSON, or a field is wrong or unknown.
        Unsupported: it asks for a feature that is not served.
    """
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise _invalid(error) from None
    _refuse_extras(body, "")
    return body


def _refuse_extras(body: _Body, path: str) -> None:
    """Refuses unknown and unserved fields, here and in nested objects."""
    for name, value in (body.model_extra or {}).items():
        if path or name not in _UNSERVED:
            raise InvalidRequest(f"Unrecognized request argument supplied: {path}{name}", param=path + name)
        if value is not None and value not in _UNSERVED[name]:
            raise Unsupported(f"{name} is not supported by this server", param=name)
    for name in body.__class__.model_fields:
        value = getattr(body, name)
        if isinstance(value, _Body):
            _refuse_extras(value, f"{path}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], _Body):
            for index, item in enumerate(value):
                _refuse_extras(item, f"{path}{name}[{index}].")


def _invalid(error: ValidationError) -> InvalidRequest:
    """The first thing that is wrong, in words."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(
            f"the request body is not valid JSON in UTF-8: {first['msg'].removeprefix('Invalid JSON: ')}"
        )
    if not first["loc"]:
        return InvalidRequest("the request body must be a JSON object")
    param = _param(first["loc"])
    if first["type"] == "missing":
        return InvalidRequest(f"you must provide {param}", param=param)
    if param == "prompt":
        return InvalidRequest(
            "prompt must be a string, a list of token ids, or a list with one of those", param=param
        )
    if param.endswith(".content"):
        return InvalidRequest(
            f'{param} must be text: a string, or a list of {{"type": "text", "text": ...}}', param=param
        )
    return InvalidRequest(f"{param} is wrong: {first['msg']}", param=param)


def _param(location: tuple[int | str, ...]) -> str:
    """A location as in "messages[0].content": without the names that pydantic gives union members."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "TextPart"):
            name += f".{part}" if name else part
        elif name:
            break
    return name
