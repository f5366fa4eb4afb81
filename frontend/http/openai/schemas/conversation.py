"""What a conversation is made of over HTTP: messages, tools, and how the template is to show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Tag

from frontend.chat.arguments import read_arguments
from frontend.chat.conversation import Conversation, effort_variables
from frontend.chat.tools import Tool, ToolChoice
from frontend.http.body import Body
from frontend.http.openai.schemas.hints import CacheHints
from pagewire.base.errors import InvalidRequest


class TextPart(CacheHints):
    """A piece of a message's content. Only text is served."""

    passes_nulls: ClassVar = True

    type: Literal["text"]
    text: str


class RefusalPart(CacheHints):
    """A piece of an earlier answer in which the model declined; text like any other."""

    passes_nulls: ClassVar = True

    type: Literal["refusal"]
    refusal: str


def _kind_of_content(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<text>"


def _kind_of_part(value: Any) -> str:
    return f"<{value.get('type') if isinstance(value, dict) else getattr(value, 'type', None)}>"


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(
        _kind_of_part,
        custom_error_type="part",
        custom_error_message='it must be text, {"type": "text", "text": ...}; nothing else is served',
    ),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<parts>")], Discriminator(_kind_of_content)
]


class CalledFunction(Body):
    """A function and its arguments, JSON as text. An answer that was cut off has no whole ones, so that
    anything is taken. `parsed_arguments` is what the official client adds to an answer; it is not used."""

    passes_nulls: ClassVar = True

    name: str
    arguments: Any = ""
    parsed_arguments: Any = None


class MessageToolCall(Body):
    """A call that an assistant's turn made."""

    passes_nulls: ClassVar = True

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def for_template(self) -> dict[str, Any]:
        """In the pipeline's form."""
        function = {"name": self.function.name, "arguments": read_arguments(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class Message(CacheHints):
    """One turn. `content` is text, whole or in parts; only the user's and the system's turns must have it.
    The fields that answers have are taken back, so that an answer's message can be sent as it came; of these,
    `annotations` and `parsed`, which the official client adds, are not used."""

    passes_nulls: ClassVar = True

    role: str
    content: Content | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    parsed: Any = None
    audio: None = None
    function_call: None = None

    def for_template(self, path: str) -> dict[str, Any]:
        """As chat templates expect it.

        Raises:
            InvalidRequest: a turn that is neither the assistant's nor a tool's has no content.
        """
        content = self._content()
        if content is None and not self.tool_calls:
            if self.role not in ("assistant", "tool"):
                raise InvalidRequest(f"you must provide {path}.content", param=f"{path}.content")
            content = ""
        calls = [call.for_template() for call in self.tool_calls or ()]
        turn = {
            "role": self.role,
            "content": content,
            "name": self.name,
            "tool_calls": calls or None,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content or self.reasoning,
        }
        return {key: value for key, value in turn.items() if value is not None}

    def _content(self) -> str | list[dict[str, str]] | None:
        if isinstance(self.content, list):
            texts = [part.text if isinstance(part, TextPart) else part.refusal for part in self.content]
            return [{"type": "text", "text": text} for text in texts]
        return self.refusal if self.content is None else self.content


class FunctionTool(CacheHints):
    """A function that the model may call."""

    type: Literal["function"]
    function: dict[str, Any]

    def to_tool(self, path: str) -> Tool:
        """In the pipeline's form. What the server alone needs is not shown to the model.

        Raises:
            InvalidRequest: its name or schema is wrong.
        """
        strict = self.function.get("strict")
        if strict is not None and not isinstance(strict, bool):
            raise InvalidRequest(
                f"{path}.function.strict is {strict!r}; it must be true or false",
                param=f"{path}.function.strict",
            )
        definition = {
            key: value
            for key, value in self.function.items()
            if key not in ("strict", "cache_control") and value is not None
        }
        return Tool(definition=definition, strict=bool(strict))


class FunctionName(Body):
    """A function, by name."""

    name: str


class NamedTool(Body):
    """One of the functions."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    """Some of the tools, and whether one must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedToolsChoice(Body):
    """OpenAI's way to choose among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind_of_choice(value: Any) -> str | None:
    if isinstance(value, str):
        return "<mode>"
    return f"<{value.get('type') if isinstance(value, dict) else getattr(value, 'type', None)}>"


ChoiceBody = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[NamedTool, Tag("<function>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed_tools>")],
    Discriminator(
        _kind_of_choice,
        custom_error_type="tool_choice",
        custom_error_message=(
            'it must be "none", "auto", "required", {"type": "function", "function": {"name": ...}} or '
            '{"type": "allowed_tools", ...}'
        ),
    ),
]


class ConversationFields(Body):
    """How messages become a prompt; the messages themselves are each endpoint's."""

    defaults: ClassVar = {
        "add_generation_prompt": True,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "include_reasoning": True,
    }

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: ChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None

    def conversation(self, messages: Sequence[Message]) -> Conversation:
        """Messages in the pipeline's form.

        Raises:
            InvalidRequest: see the messages.
        """
        tools, choice = self._chosen()
        variables = {**effort_variables(self.reasoning_effort), **(self.chat_template_kwargs or {})}
        opens_turn = self.add_generation_prompt
        return Conversation(
            messages=[message.for_template(f"messages[{index}]") for index, message in enumerate(messages)],
            add_generation_prompt=not self.continue_final_message if opens_turn is None else opens_turn,
            continue_final_message=self.continue_final_message,
            chat_template=self.chat_template,
            template_variables=variables,
            documents=self.documents,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            include_reasoning=self.include_reasoning is not False,
        )

    def _chosen(self) -> tuple[list[Tool], ToolChoice]:
        tools = [tool.to_tool(f"tools[{index}]") for index, tool in enumerate(self.tools or ())]
        choice = self.tool_choice
        if choice is None:
            return tools, ToolChoice()
        if isinstance(choice, str):
            return tools, ToolChoice(kind=choice)
        if isinstance(choice, NamedTool):
            return tools, ToolChoice(kind="named", name=choice.function.name)
        allowed = {tool.function.name for tool in choice.allowed_tools.tools}
        missing = allowed.difference(tool.name for tool in tools)
        if missing or not allowed:
            raise InvalidRequest(
                f"tool_choice.allowed_tools.tools names {', '.join(sorted(missing)) or 'nothing'}; it must "
                "name some of those in tools",
                param="tool_choice",
            )
        return [tool for tool in tools if tool.name in allowed], ToolChoice(kind=choice.allowed_tools.mode)
