"""Renders a conversation as the prompt that a model was trained on.

The template language and its variables are those of Hugging Face chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pagewire.errors import ConfigError, InvalidRequest

MAX_PROMPT_CHARACTERS = 16 * 1024 * 1024
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A model's chat template, compiled once. Immutable and thread-safe.

    It runs in Jinja's sandbox, on data that requests bring, but is itself the operator's: it comes with
    the model. The size of its output is bounded. Its time is bounded only by the sandbox's limit of
    100,000 steps on each range(): a template that loops endlessly without output could be stopped
    only from outside, by rendering in a process of its own with a CPU limit.
    """

    _default: jinja2.Template
    _with_tools: jinja2.Template
    _special_tokens: Mapping[str, str]

    @classmethod
    def load(cls, model_dir: Path, override: Path | None) -> ChatTemplate | None:
        """The template of a model directory, or the override instead; None if there is none.

        Looked for in this order: the override, chat_template.jinja, `chat_template` in
        tokenizer_config.json, which is one template or a list of named ones. Of these, `default` is
        used, and `tool_use`, if there is one, for requests with tools.

        Raises:
            ConfigError: a file cannot be read or the template has a syntax error.
        """
        config = _read_tokenizer_config(model_dir / "tokenizer_config.json")
        origin = override or model_dir / "chat_template.jinja"
        if override is not None or origin.is_file():
            sources = {"default": _read_text(origin)}
        else:
            origin = model_dir / "tokenizer_config.json"
            sources = _named_templates(origin, config.get("chat_template"))
        if not sources:
            return None
        compiled = {name: _compile(origin, source) for name, source in sources.items()}
        return cls(
            compiled["default"], compiled.get("tool_use", compiled["default"]), _special_token_texts(config)
        )

    def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: `role`, `content` and whatever else the template knows.
            add_generation_prompt: whether to end with the beginning of the assistant's turn.
            variables: further variables of the template, such as `tools`.

        Raises:
            InvalidRequest: the template refuses the conversation or the prompt is too large.
        """
        context: dict[str, Any] = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._with_tools if context["tools"] else self._default
        try:
            return _bounded_join(template.generate(context))
        except InvalidRequest:
            raise
        except Exception as error:  # a template can raise what any expression can, such as None + "text"
            raise InvalidRequest(
                f"the chat template refused the conversation: {error}", param="messages"
            ) from error


def _bounded_join(chunks: Any) -> str:
    parts, size = [], 0
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_PROMPT_CHARACTERS:
            raise InvalidRequest(
                f"the rendered conversation is longer than {MAX_PROMPT_CHARACTERS:,} characters",
                param="messages",
            )
    return "".join(parts)


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
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must be a JSON object")
    return config


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template: {error}") from error


def _compile(origin: Path, source: str) -> jinja2.Template:
    try:
        return _ENVIRONMENT.from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"{origin}: the chat template has an error: {error}") from error


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here its content is just shown."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _new_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _refuse, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


_ENVIRONMENT = _new_environment()
