"""Renders a conversation as the prompt that a model was trained on.

The template language and its variables are those of Hugging Face chat templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from frontend.chat.conversation import Conversation
from frontend.chat.settings import is_template
from frontend.text.template_messages import CONTINUED, messages_for, plainer
from frontend.text.template_protocol import PromptTooLong
from frontend.text.template_renderer import RENDERER, TemplateFailed, TemplateWrong, TooMuch
from frontend.text.template_traits import TemplateTraits
from frontend.text.untrusted_template import render_untrusted
from pagewire.base.errors import ConfigError, InvalidRequest, Unsupported
from pagewire.hub.model_files import MAX_TEMPLATE_BYTES, read_bytes, read_json_object

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
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
    """One template and where it comes from."""

    origin: Path | str
    source: str
    traits: TemplateTraits


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
        cls, model_dir: Path, override: str | None, *, trust_requests: bool = False
    ) -> ChatTemplate | None:
        """The templates of a model directory, or the override instead; None if there are none.

        Looked for in this order: the override, chat_template.jinja with additional_chat_templates/*.jinja,
        `chat_template` in tokenizer_config.json, which is one template or a list of named ones. Of these,
        `default` is used, and `tool_use`, if there is one, for requests with tools.

        Args:
            override: a file, or the template itself.
            trust_requests: whether requests may bring templates.

        Raises:
            ConfigError: a file cannot be read, or a template has an error or takes too much time or memory.
        """
        config = _read_tokenizer_config(model_dir / "tokenizer_config.json")
        sources = _sources(model_dir, override, config)
        if not sources:
            return None
        by_name = {name: _read_template(origin, source) for name, (origin, source) in sources.items()}
        loaded = cls(by_name, _special_token_texts(config), trust_requests)
        loaded._try()
        return loaded

    @property
    def source(self) -> str:
        """The template's text; of several, all of them."""
        return "\n".join(template.source for template in self._by_name.values())

    def render(self, conversation: Conversation) -> str:
        """The prompt for a conversation.

        Raises:
            InvalidRequest: the template refuses the conversation, the prompt is too large, or the variables
                given are the template's own.
            Unsupported: the request brings a template and that is not allowed.
            Overloaded: conversations that take long to render are being rendered already.
        """
        given = conversation.chat_template
        if given is not None and given not in self._by_name:
            return self._render_theirs(given, conversation)
        default = self._by_name["default"]
        if given is not None:
            template = self._by_name[given]
        else:
            template = self._by_name.get("tool_use", default) if conversation.tools else default
        try:
            rendered = self._render(template, conversation)
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
        return _left_open(rendered) if conversation.continue_final_message else rendered

    def _render(self, template: _Template, conversation: Conversation) -> str:
        """What the template writes. If it refuses the conversation, it sees it in plainer forms: an earlier
        answer, of this server or another, must not end a conversation.

        Raises:
            TemplateFailed: the first refusal. And what else `TemplateRenderer.render` raises.
        """
        variables = self._variables(conversation, template.traits)
        try:
            return RENDERER.render(template.source, variables)
        except TemplateFailed as refused:
            for plain in plainer(variables):
                with suppress(TemplateFailed):
                    return RENDERER.render(template.source, plain)
            raise refused from None

    def _try(self) -> None:
        """Renders short conversations, so that a template that never ends is found at the start. One that
        refuses them may take others."""
        for template in self._by_name.values():
            for messages in (_TRIED, _TRIED[:2], _TRIED[1:2]):
                conversation = Conversation(messages=messages)
                try:
                    RENDERER.render(template.source, self._variables(conversation, template.traits))
                except TemplateFailed:
                    continue
                except PromptTooLong as error:
                    raise ConfigError(f"{template.origin}: of a short conversation, {error}") from error
                except TooMuch as error:
                    raise ConfigError(
                        f"{template.origin}: the chat template takes {error} for a short conversation"
                    ) from error

    def _render_theirs(self, source: str, conversation: Conversation) -> str:
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
        rendered = render_untrusted(source, self._variables(conversation, traits))
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


def _special_token_texts(config: dict[str, Any]) -> dict[str, str]:
    """bos_token and the like. Each is a string, or an object with its text in `content`."""
    texts = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            texts[name] = text
    return texts


def _read_tokenizer_config(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


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
