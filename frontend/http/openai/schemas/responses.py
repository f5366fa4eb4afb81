"""POST /v1/responses: what it takes. Nothing is stored, so whatever refers to something stored is refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from frontend.chat.conversation import Conversation, effort_variables
from frontend.chat.tools import Tool, ToolChoice
from frontend.http.body import Body, Seconds, TokenIdList
from frontend.http.openai.schemas.generation import MODELS_OWN_DEFAULTS
from frontend.http.openai.schemas.hints import UNSERVED, CacheHints, Hints
from frontend.http.openai.schemas.response_items import Input, turns
from pagewire.base.errors import InvalidRequest, Unsupported
from pagewire.wire.sampling_params import StructuredOutput

MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (_LOGPROBS, "reasoning.encrypted_content")
"""The second asks for thoughts in a form to be sent back; they are in the answer in any case, readable."""


class FormatBody(Body):
    """What the text must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextBody(Body):
    """How the text is to be."""

    format: FormatBody | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningBody(Body):
    """How much the model is to think."""

    unserved: ClassVar = {"context": ("auto",), "mode": ("standard",)}

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseTool(CacheHints):
    """A function that the model may call."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def to_tool(self, path: str) -> Tool:
        """Raises:
        Unsupported: it is no function, but one of OpenAI's own tools.
        """
        if self.type != "function":
            raise Unsupported(
                f"{path}.type is {self.type!r}; this server has no tools of its own, only functions of yours",
                param=f"{path}.type",
            )
        definition = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return Tool(
            definition={name: value for name, value in definition.items() if value is not None},
            strict=bool(self.strict),
        )


class ChosenTool(Body):
    """One tool, by name."""

    type: Literal["function"]
    name: str


class AllowedResponseTools(Body):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenTool]


def _kind_of_choice(value: Any) -> str:
    if isinstance(value, str):
        return "<word>"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>"


ChoiceBody = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[ChosenTool, Tag("<function>")]
    | Annotated[AllowedResponseTools, Tag("<allowed_tools>")],
    Discriminator(
        _kind_of_choice,
        custom_error_type="tool_choice",
        custom_error_message="it must be none, auto, required, a function or allowed_tools",
    ),
]


class StreamBody(Body):
    """How the stream is to be."""

    include_obfuscation: bool | None = None


class ResponsesBody(Hints):
    """POST /v1/responses. OpenAI's fields, and behind `user` further ones."""

    forms: ClassVar = {"input": "a string or a list of items"}
    unserved: ClassVar = UNSERVED
    defaults: ClassVar = {
        **MODELS_OWN_DEFAULTS,
        "background": False,
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "store": False,
        "stream": False,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "truncation": "disabled",
        "priority": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "min_tokens": 0,
        "ignore_eos": False,
    }

    model: str | None = None
    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    text: TextBody | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: ChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningBody | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stream: bool | None = None
    stream_options: StreamBody | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    user: str | None = None
    request_id: str | None = None
    priority: int | None = None
    timeout: Seconds | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIdList | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[int, float] | None = None

    def check(self) -> None:
        """Refuses what this server cannot do, and what contradicts itself.

        Raises:
            InvalidRequest, Unsupported: see the messages.
        """
        stored = "this server stores no responses; send the whole conversation as input"
        for name, reason in (("previous_response_id", stored), ("conversation", stored), ("prompt", stored)):
            if getattr(self, name) is not None:
                raise Unsupported(f"{name} is not supported: {reason}", param=name)
        if self.background:
            raise Unsupported(
                "background is true; a response that is not stored cannot be fetched later: stream it",
                param="background",
            )
        for name in ("max_output_tokens", "max_tool_calls"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise InvalidRequest(f"{name} is {limit}; it must be at least 1", param=name)
        self._check_nested()
        self._check_metadata()

    def _check_nested(self) -> None:
        for name in self.include or ():
            if name not in _INCLUDABLE:
                raise Unsupported(
                    f"include has {name!r}; it may have {' and '.join(_INCLUDABLE)}", param="include"
                )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream: true", param="stream_options")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise Unsupported(
                "stream_options.include_obfuscation is not supported; streams have none here",
                param="stream_options.include_obfuscation",
            )
        for name in ("summary", "generate_summary"):
            wanted = getattr(self.reasoning, name, None)
            if wanted not in (None, "auto"):
                raise Unsupported(
                    f"reasoning.{name} is {wanted!r}; thoughts are not summarised here but sent whole: leave "
                    "it out or use auto",
                    param=f"reasoning.{name}",
                )

    def _check_metadata(self) -> None:
        metadata = self.metadata or {}
        too_long = [
            key
            for key, value in metadata.items()
            if len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE
        ]
        if len(metadata) > MAX_METADATA or too_long:
            raise InvalidRequest(
                f"metadata may have at most {MAX_METADATA} entries, keys of at most {MAX_METADATA_KEY} and "
                f"values of at most {MAX_METADATA_VALUE} characters",
                param="metadata",
            )

    def to_converse(self) -> Conversation:
        """The conversation in the pipeline's form.

        Raises:
            InvalidRequest, Unsupported: see the messages.
        """
        tools = [tool.to_tool(f"tools[{index}]") for index, tool in enumerate(self.tools or ())]
        tools, choice = self._chosen(tools)
        effort = self.reasoning.effort if self.reasoning is not None else None
        variables = {**effort_variables(effort), **(self.chat_template_kwargs or {})}
        return Conversation(
            messages=turns(self.input, self.instructions),
            template_variables=variables,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
        )

    def _chosen(self, tools: list[Tool]) -> tuple[list[Tool], ToolChoice]:
        choice = self.tool_choice
        if choice is None:
            return tools, ToolChoice()
        if isinstance(choice, str):
            return tools, ToolChoice(kind=choice)
        if isinstance(choice, ChosenTool):
            return tools, ToolChoice(kind="named", name=choice.name)
        names = {tool.name for tool in choice.tools}
        missing = names.difference(tool.name for tool in tools)
        if missing or not names:
            raise InvalidRequest(
                f"tool_choice allows {', '.join(map(repr, sorted(missing))) or 'no tool'}; it must name some "
                "of those in tools",
                param="tool_choice.tools",
            )
        return [tool for tool in tools if tool.name in names], ToolChoice(kind=choice.mode)

    def structured_output(self) -> StructuredOutput | None:
        """What the text must look like.

        Raises:
            InvalidRequest: the schema is missing, or is there for another type.
        """
        form = self.text.format if self.text is not None else None
        if form is None or form.type != "json_schema":
            if form is not None and form.schema_ is not None:
                raise InvalidRequest(
                    f'text.format.schema is set; it needs type "json_schema", not "{form.type}"',
                    param="text.format.schema",
                )
            if form is not None and form.type == "json_object":
                return StructuredOutput(json_object=True)
            return None
        if form.schema_ is None:
            raise InvalidRequest(
                'text.format.schema is missing; type "json_schema" needs it', param="text.format.schema"
            )
        return StructuredOutput(json_schema=json.dumps(form.schema_, ensure_ascii=False))

    def strict_schema(self) -> bool:
        """Whether the text's schema is to be refused rather than relaxed."""
        form = self.text.format if self.text is not None else None
        return form is None or bool(form.strict)

    def sampling_given(self) -> dict[str, Any]:
        """The sampling parameters that the client set, by SamplingParams field.

        Raises:
            InvalidRequest: see `structured_output`.
        """
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        given["max_tokens"] = self.max_output_tokens
        given["structured_output"] = self.structured_output()
        if self.top_logprobs is not None or _LOGPROBS in (self.include or ()):
            given["logprobs"] = self.top_logprobs or 0
        return {name: value for name, value in given.items() if value is not None}


_SAMPLING_FIELDS = (
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
    "logit_bias",
)
