"""What the endpoints of messages take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from frontend.chat.conversation import Conversation
from frontend.chat.tools import Tool, ToolChoice
from frontend.http.anthropic.blocks import CacheControl, MessageBody, Texts
from frontend.http.anthropic.history import turns_of
from frontend.http.body import Body
from pagewire.base.errors import InvalidRequest, Unsupported
from pagewire.wire.sampling_params import StructuredOutput

_NO_INPUT: Mapping[str, Any] = {"type": "object", "properties": {}}
"""Templates show a tool's schema without asking whether it has one."""


class CustomTool(Body):
    """A function that the model may call. Of the fields behind `strict` none changes what it is told."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    input_examples: list[dict[str, Any]] | None = None
    strict: bool | None = None
    cache_control: CacheControl = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None
    allowed_callers: list[str] | None = None

    def to_tool(self, path: str) -> Tool:
        """In the pipeline's form.

        Raises:
            InvalidRequest: its name is none.
        """
        definition = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema or _NO_INPUT,
            "input_examples": self.input_examples,
        }
        return Tool(
            definition={key: value for key, value in definition.items() if value is not None},
            strict=bool(self.strict),
        )


class ForeignTool(Body):
    """A tool that Anthropic has defined."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": True})

    type: str

    def to_tool(self, path: str) -> Tool:
        """Raises:
        Unsupported: always.
        """
        raise Unsupported(
            f"{path}.type is {self.type!r}; this server has none of Anthropic's tools, only custom ones, "
            "which have a name and an input_schema and are run by you",
            param=f"{path}.type",
        )


def _kind_of_tool(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "<custom>" if kind in (None, "custom") else "<foreign>"


ToolBody = Annotated[
    Annotated[CustomTool, Tag("<custom>")] | Annotated[ForeignTool, Tag("<foreign>")],
    Discriminator(_kind_of_tool),
]


class ToolChoiceBody(Body):
    """Whether the model may or must call a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def to_choice(self) -> ToolChoice:
        """Raises:
        InvalidRequest: a tool is to be called that is not named.
        """
        if self.type == "tool":
            if not self.name:
                raise InvalidRequest('tool_choice of type "tool" needs a name', param="tool_choice.name")
            return ToolChoice(kind="named", name=self.name)
        if self.type == "any":
            return ToolChoice(kind="required")
        return ToolChoice(kind=self.type)


class ThinkingBody(Body):
    """Whether the model is to think. A budget is taken and not enforced: how much it thinks is up to it."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class FormatBody(Body):
    """What the text must look like."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfigBody(Body):
    """How the answer is to be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: FormatBody | None = None


class MetadataBody(Body):
    """Whose request it is."""

    user_id: str | None = None


class ConversationBody(Body):
    """What makes the prompt. From `cache_control` on: fields that ask for nothing that could be seen here."""

    forms: ClassVar = {"system": "a string or a list of text blocks", "messages": "a list of messages"}

    model: str | None = None
    messages: list[MessageBody]
    system: Texts | None = None
    tools: list[ToolBody] | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: ThinkingBody | None = None
    output_config: OutputConfigBody | None = None
    output_format: FormatBody | None = None
    mcp_servers: list[Any] | None = None
    container: Any = None
    cache_control: CacheControl = None
    context_management: dict[str, Any] | None = None
    diagnostics: dict[str, Any] | None = None
    fallbacks: list[Any] | str | None = None
    inference_geo: str | None = None
    metadata: MetadataBody | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    speed: Literal["standard", "fast"] | None = None

    def to_converse(self) -> Conversation:
        """The conversation in the pipeline's form. A last message of the assistant's that has text and no
        call is gone on with.

        Raises:
            InvalidRequest, Unsupported: see the messages.
        """
        self._check()
        turns = turns_of(self.system, self.messages)
        last: dict[str, Any] = turns[-1] if turns else {}
        of_assistant = last.get("role") == "assistant"
        continues = of_assistant and bool(last["content"]) and "tool_calls" not in last
        if of_assistant and len(turns) > 1 and set(last) == {"role", "content"} and not continues:
            turns.pop()  # nothing is said in it yet
        tool_choice, thinking = self.tool_choice, self.thinking
        return Conversation(
            messages=turns,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            template_variables=self._variables(),
            tools=[tool.to_tool(f"tools[{index}]") for index, tool in enumerate(self.tools or ())],
            tool_choice=ToolChoice() if tool_choice is None else tool_choice.to_choice(),
            parallel_tool_calls=tool_choice is None or not tool_choice.disable_parallel_tool_use,
            include_reasoning=thinking is None or thinking.display != "omitted",
        )

    def structured_output(self) -> StructuredOutput | None:
        """What the text must look like."""
        form = self.output_format
        if self.output_config is not None and self.output_config.format is not None:
            form = self.output_config.format
        if form is None:
            return None
        return StructuredOutput(json_schema=json.dumps(form.schema_, ensure_ascii=False))

    def _check(self) -> None:
        if self.mcp_servers:
            raise Unsupported(
                "mcp_servers is not supported: this server calls no tools itself; give your client the MCP "
                "servers, and send their tools as custom ones",
                param="mcp_servers",
            )
        if self.container is not None:
            raise Unsupported("container is not supported: this server runs no code", param="container")

    def _variables(self) -> dict[str, Any]:
        """Variables of the template. Those that it does not know do nothing."""
        variables: dict[str, Any] = {}
        if self.thinking is not None:
            thinks = self.thinking.type != "disabled"
            variables |= {"enable_thinking": thinks, "thinking": thinks}
        if self.output_config is not None and self.output_config.effort is not None:
            variables["reasoning_effort"] = self.output_config.effort
        return variables


class CountTokensBody(ConversationBody):
    """POST /v1/messages/count_tokens."""


class MessagesBody(ConversationBody):
    """POST /v1/messages."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def sampling_given(self) -> dict[str, Any]:
        """The sampling parameters that the client set, by SamplingParams field.

        Raises:
            InvalidRequest: max_tokens is none.
        """
        if self.max_tokens < 1:
            raise InvalidRequest(
                f"max_tokens is {self.max_tokens}; it must be at least 1", param="max_tokens"
            )
        given = {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "structured_output": self.structured_output(),
        }
        return {name: value for name, value in given.items() if value is not None}
