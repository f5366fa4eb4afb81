"""Renders a conversation as the prompt that a model was trained on.

The template language and its variables are those of Hugging Face chat templates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2

from frontend.chat.conversation import Conversation
from frontend.chat.generic_tools import (
    with_calls_as_text,
    with_results_as_text,
    with_tools_described,
)
from frontend.chat.settings import is_template
from frontend.chat.tools import ToolChoice
from frontend.text.builtin_templates import builtin_template
from frontend.text.rendered_prompt import CONTROL_MARK, RenderedPrompt, draw_mark, split_at_marks
from frontend.text.template_messages import CONTINUED, messages_for, plainer
from frontend.text.template_protocol import PromptTooLong
from frontend.text.template_renderer import RENDERER, TemplateFailed, TemplateWrong, TooMuch
from frontend.text.template_traits import TemplateTraits
from frontend.text.tokenizer_config import read_tokenizer_config, special_token_texts
from frontend.text.untrusted_template import render_untrusted
from pagewire.base.errors import ConfigError, InvalidRequest, Unsupported
from pagewire.hub.model_files import MAX_TEMPLATE_BYTES, read_bytes

logger = logging.getLogger(__name__)

_TRIED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]
"""A template that cannot render one of its beginnings or ends within the limits is refused at the start."""
_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True, slots=True)
class _Template:
    """One template, where it comes from, and whether it shows turns of the system and marks control tokens
    (`rendered_prompt`)."""

    origin: Path | str
    source: str
    traits: TemplateTraits
    shows_system: bool = True
    marks_controls: bool = False


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A model's chat template. Immutable and thread-safe.

    It runs in Jinja's sandbox, in another process, with limits on time, memory and what it writes: it comes
    with the model, from whoever made that, and sees data that requests bring.
    """

    _by_name: Mapping[str, _Template]
    _special_tokens: Mapping[str, str]
    _trust_requests: bool

    @classmethod
    def load(
        cls,
        model_dir: Path,
        override: str | None,
        *,
        trust_requests: bool = False,
        has_token: Callable[[str], bool] | None = None,
    ) -> ChatTemplate | None:
        """The templates of a model directory, or the override instead; None if there are none.

        Looked for in this order: the override, chat_template.jinja with additional_chat_templates/*.jinja,
        `chat_template` in tokenizer_config.json, which is one template or a list of named ones. Of these,
        `default` is used, and `tool_use`, if there is one, for requests with tools. Last, the one that comes
        with pagewire for the model's family.

        Args:
            override: a file, or the template itself.
            trust_requests: whether requests may bring templates.
            has_token: whether the tokenizer has a token; without it no template of pagewire's is looked for.

        Raises:
            ConfigError: a file cannot be read, or a template has an error or takes too much time or memory.
        """
        config = read_tokenizer_config(model_dir)
        sources = _sources(model_dir, override, config)
        by_name = {name: _read_template(origin, source) for name, (origin, source) in sources.items()}
        if not by_name and has_token is not None:
            ours = builtin_template(model_dir, has_token)
            if ours is not None:
                logger.info("the model has no chat template; it gets the one of %s", ours.stem)
                template = _read_template(ours, _read_text(ours))
                by_name = {"default": replace(template, marks_controls=True)}
        if not by_name:
            return None
        loaded = cls(by_name, special_token_texts(config), trust_requests)
        tried = {name: replace(each, shows_system=loaded._try(each)) for name, each in by_name.items()}
        return replace(loaded, _by_name=tried)

    @property
    def source(self) -> str:
        """The template's text; of several, all of them."""
        return "\n".join(template.source for template in self._by_name.values())

    @property
    def marks_controls(self) -> bool:
        """Whether it says which tokens are control tokens, so that no content can be one."""
        return any(template.marks_controls for template in self._by_name.values())

    @property
    def default_source(self) -> str:
        """The text of the template for requests without tools."""
        return self._by_name["default"].source

    def render(self, conversation: Conversation, *, tools_as_text: bool = False) -> str:
        """The prompt for a conversation as one text. See `render_prompt`."""
        return self.render_prompt(conversation, tools_as_text=tools_as_text).text

    def render_prompt(self, conversation: Conversation, *, tools_as_text: bool = False) -> RenderedPrompt:
        """The prompt for a conversation.

        Args:
            tools_as_text: whether tools and calls of earlier turns are told in plain text, not by the
                template. Where the template shows no calls, those of earlier turns are text in any case.

        Raises:
            InvalidRequest: the template refuses the conversation, the prompt is too large, or the variables
                given are the template's own.
            Unsupported: the request brings a template and that is not allowed.
            Overloaded: conversations that take long to render are being rendered already.
        """
        given = conversation.chat_template
        if given is not None and given not in self._by_name:
            return RenderedPrompt(self._render_theirs(given, conversation, tools_as_text))
        default = self._by_name["default"]
        if given is not None:
            template = self._by_name[given]
        else:
            template = self._by_name.get("tool_use", default) if conversation.tools else default
        shown = _in_text(conversation, template, tools_as_text)
        mark = draw_mark() if template.marks_controls else ""
        try:
            rendered = self._render(template, shown, mark)
        except PromptTooLong as error:
            raise InvalidRequest(str(error), param="messages") from error
        except TooMuch as error:
            raise InvalidRequest(
                f"the chat template took {error} for this conversation", param="messages"
            ) from error
        except (TemplateFailed, TemplateWrong) as error:
            raise InvalidRequest(
                f"the chat template refused the conversation: {error}", param="messages"
            ) from error
        if conversation.continue_final_message:
            rendered = _left_open(rendered)
        return split_at_marks(rendered, mark) if mark else RenderedPrompt(rendered)

    def _render(self, template: _Template, conversation: Conversation, mark: str) -> str:
        """What the template writes. If it refuses the conversation, it sees it in plainer forms: an earlier
        answer, of this server or another, must not end a conversation.

        Raises:
            TemplateFailed: the first refusal. And what else `TemplateRenderer.render` raises.
        """
        variables = self._variables(conversation, template.traits)
        if mark:
            variables[CONTROL_MARK] = mark
        try:
            return RENDERER.render(template.source, variables)
        except TemplateFailed as refused:
            for plain in plainer(variables):
                with suppress(TemplateFailed):
                    return RENDERER.render(template.source, plain)
            raise refused from None

    def _try(self, template: _Template) -> bool:
        """Renders short conversations, so that a template that never ends is found at the start. One that
        refuses them may take others. Whether what the system says was shown."""
        shows_system = False
        for messages in (_TRIED, _TRIED[:2], _TRIED[1:2]):
            conversation = Conversation(messages=messages)
            try:
                rendered = RENDERER.render(template.source, self._variables(conversation, template.traits))
            except TemplateFailed:
                continue
            except PromptTooLong as error:
                raise ConfigError(f"{template.origin}: of a short conversation, {error}") from error
            except TooMuch as error:
                raise ConfigError(
                    f"{template.origin}: the chat template takes {error} for a short conversation"
                ) from error
            shows_system = shows_system or _TRIED[0]["content"] in rendered
        return shows_system

    def _render_theirs(self, source: str, conversation: Conversation, tools_as_text: bool) -> str:
        if not self._trust_requests:
            raise Unsupported(
                "this server takes no chat_template from requests; it would if it were started with "
                "--trust-request-chat-template",
                param="chat_template",
            )
        try:
            traits = TemplateTraits.read(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InvalidRequest(f"chat_template has an error: {error}", param="chat_template") from error
        shown = _in_text(conversation, _Template("chat_template", source, traits), tools_as_text)
        rendered = render_untrusted(source, self._variables(shown, traits))
        return _left_open(rendered) if conversation.continue_final_message else rendered

    def _variables(self, conversation: Conversation, traits: TemplateTraits) -> dict[str, Any]:
        own = next((name for name in _OWN_VARIABLES if name in conversation.template_variables), None)
        if own is not None:
            raise InvalidRequest(
                f"chat_template_kwargs has {own!r}, which is a field of the request itself",
                param="chat_template_kwargs",
            )
        tools = [tool.for_template() for tool in conversation.tools] or None
        return {
            **self._special_tokens,
            "documents": conversation.documents,
            **conversation.template_variables,
            "tools": None if conversation.tool_choice.kind == "none" else tools,
            "messages": messages_for(conversation, traits),
            "add_generation_prompt": conversation.add_generation_prompt,
        }


def _in_text(conversation: Conversation, template: _Template, tools_as_text: bool) -> Conversation:
    """The conversation with those tools and calls in its text that the template is not to show."""
    traits, messages = template.traits, conversation.messages
    continued = messages[-1:] if conversation.continue_final_message else []
    earlier = messages[: len(messages) - len(continued)]
    if tools_as_text or not traits.knows_calls:
        earlier = with_calls_as_text(earlier)
    if tools_as_text or not traits.knows_results:
        earlier = with_results_as_text(earlier)
    messages = [*earlier, *continued]
    if not tools_as_text:
        return conversation if messages == conversation.messages else replace(conversation, messages=messages)
    if conversation.tools and conversation.tool_choice.kind != "none":
        messages = with_tools_described(
            messages,
            conversation.tools,
            parallel=conversation.parallel_tool_calls,
            in_system_turn=template.shows_system,
        )
    return replace(conversation, messages=messages, tools=(), tool_choice=ToolChoice())


def _left_open(rendered: str) -> str:
    """A prompt up to the end of its last turn's content.

    Raises:
        InvalidRequest: the template does not show the end of the content.
    """
    end = rendered.rfind(CONTINUED.strip())
    if end < 0:
        raise InvalidRequest(
            "the last message cannot be continued: the chat template does not show the end of its content",
            param="continue_final_message",
        )
    text = rendered[:end]
    # Without the space at its end, the template trims contents, and so it would the real one.
    return text if rendered.startswith(CONTINUED, end) else text.rstrip()


def _sources(
    model_dir: Path, override: str | None, config: Mapping[str, Any]
) -> dict[str, tuple[Path | str, str]]:
    """Where each template comes from, and its text, by name."""
    if override is not None:
        return {"default": _override(override)}
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        more = sorted((model_dir / "additional_chat_templates").glob("*.jinja"))
        named = {path.stem: (path, _read_text(path)) for path in more}
        return {**named, "default": (file, _read_text(file))}
    origin = model_dir / "tokenizer_config.json"
    by_name = _named_templates(origin, config.get("chat_template"))
    return {name: (origin, source) for name, source in by_name.items()}


def _override(override: str) -> tuple[Path | str, str]:
    if is_template(override):
        return "--chat-template", override
    return Path(override), _read_text(Path(override))


def _named_templates(origin: Path, value: Any) -> dict[str, str]:
    match value:
        case None:
            return {}
        case str():
            return {"default": value}
        case [*entries] if all(_is_named_template(entry) for entry in entries):
            named = {entry["name"]: entry["template"] for entry in entries}
            if "default" in named:
                return named
            raise ConfigError(f"{origin}: no chat template is named 'default', only {', '.join(named)}")
    raise ConfigError(f"{origin}: chat_template must be a string or a list of named templates")


def _is_named_template(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
    )


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error


def _read_template(origin: Path | str, source: str) -> _Template:
    """Compiles it where that can do no harm; what compiled there can also be parsed here."""
    if len(source) > MAX_TEMPLATE_BYTES:
        raise ConfigError(
            f"{origin}: the chat template has {len(source)} characters; at most {MAX_TEMPLATE_BYTES} are read"
        )
    try:
        RENDERER.compile(source)
        return _Template(origin, source, TemplateTraits.read(source))
    except (TemplateWrong, jinja2.TemplateError) as error:
        raise ConfigError(f"{origin}: the chat template has an error: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{origin}: the chat template is nested too deeply") from error
    except TooMuch as error:
        raise ConfigError(f"{origin}: the chat template takes {error} to compile") from error
