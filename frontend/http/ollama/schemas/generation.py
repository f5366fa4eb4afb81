"""POST /api/chat and /api/generate."""

from __future__ import annotations

import json
from typing import Any

from frontend.chat.conversation import Conversation
from frontend.http.body import Body, TokenIdList
from frontend.http.ollama.schemas.messages import NO_IMAGES, Messages, OllamaTool, for_template
from frontend.http.ollama.schemas.options import OllamaOptions
from frontend.served_model import ServedModel
from pagewire.base.errors import InvalidRequest, Unsupported
from pagewire.wire.sampling_params import StructuredOutput

_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "max": "high"}


class OllamaGeneratingBody(Body):
    """What both generating endpoints take. Prompts are never cut to fit: `truncate` and `shift`, which Ollama
    does so by, change nothing."""

    model: str | None = None
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    think: bool | str | None = None
    keep_alive: float | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    truncate: bool | None = None
    shift: bool | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream, which it is unless the client says otherwise."""
        return self.stream is not False

    def sampling_given(self) -> dict[str, Any]:
        """The sampling parameters that the client set, by SamplingParams field.

        Raises:
            InvalidRequest: `format` is wrong.
        """
        given = {} if self.options is None else self.options.sampling_given()
        constraint = self._constraint()
        if constraint is not None:
            given["structured_output"] = constraint
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given

    def template_variables(self, model: ServedModel) -> dict[str, Any]:
        """What `think` says to the model's chat template, by each of the names that templates have for it.

        Raises:
            InvalidRequest: it is no value that there is, or this model does not think.
        """
        if self.think is None or self.think == "":
            return {}
        if isinstance(self.think, str) and self.think not in _EFFORTS:
            raise InvalidRequest(
                f"think is {self.think!r}; it must be true, false, {', '.join(map(repr, _EFFORTS))}",
                param="think",
            )
        if self.think and model.replies.reasoning is None:
            raise InvalidRequest(f'"{self.model or model.names[0]}" does not support thinking', param="think")
        wanted = bool(self.think)
        variables: dict[str, Any] = {"enable_thinking": wanted, "thinking": wanted}
        if isinstance(self.think, str) and model.template and "reasoning_effort" in model.template.source:
            variables["reasoning_effort"] = _EFFORTS[self.think]
        return variables

    def _constraint(self) -> StructuredOutput | None:
        if self.format is None or self.format == "":
            return None
        if self.format == "json":
            return StructuredOutput(json_object=True)
        if isinstance(self.format, str):
            raise InvalidRequest(
                f'invalid format: {self.format!r}; it must be "json" or a JSON Schema, an object',
                param="format",
            )
        return StructuredOutput(json_schema=json.dumps(self.format, ensure_ascii=False))


class OllamaChatBody(OllamaGeneratingBody):
    """POST /api/chat."""

    messages: Messages | None = None
    tools: list[OllamaTool] | None = None

    def conversation(self, model: ServedModel) -> Conversation:
        """The turns in the pipeline's form. The model goes on with a last turn of its own, as with Ollama.

        Raises:
            InvalidRequest, Unsupported: see the messages.
        """
        messages = for_template(self.messages or [])
        last = messages[-1]
        goes_on = last["role"] == "assistant" and bool(last.get("content")) and "tool_calls" not in last
        return Conversation(
            messages=messages,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            template_variables=self.template_variables(model),
            tools=[tool.to_tool() for tool in self.tools or ()],
            include_reasoning=self.think is not False,
        )


class OllamaGenerateBody(OllamaGeneratingBody):
    """POST /api/generate. `context` is an earlier answer's: the conversation goes on behind it."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: TokenIdList | None = None
    raw: bool | None = None
    images: list[Any] | None = None

    def check(self) -> None:
        """Refuses what is not served.

        Raises:
            InvalidRequest, Unsupported: naming it.
        """
        if self.raw and (self.template or self.system or self.context):
            raise InvalidRequest("raw mode does not support template, system, or context", param="raw")
        refusals = {
            "images": NO_IMAGES,
            "suffix": "suffix is not served: this server's models write on, they do not fill gaps",
            "template": "template is not served: Ollama's are in Go's template language, this server's in "
            "Jinja; send the whole prompt with raw: true instead",
        }
        for name, message in refusals.items():
            if getattr(self, name):
                raise Unsupported(message, param=name)

    def conversation(self, model: ServedModel) -> Conversation:
        """The prompt as a user's turn, behind the system's.

        Raises:
            InvalidRequest: see `template_variables`.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        return Conversation(
            messages=[*system, {"role": "user", "content": self.prompt or ""}],
            template_variables=self.template_variables(model),
            include_reasoning=self.think is not False,
        )
