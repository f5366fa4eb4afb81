"""The language of chat templates: Jinja's, in its sandbox, with the functions that Hugging Face adds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from frontend.text.template_protocol import PromptTooLong

MAX_PROMPT_CHARACTERS = 16 * 1024 * 1024


def compile_template(source: str) -> jinja2.Template:
    """A template to render any number of times, from any thread.

    Raises:
        jinja2.TemplateError: it has an error.
    """
    return _ENVIRONMENT.from_string(source)


def parse_template(source: str) -> nodes.Template:
    """A template's syntax tree. Nothing of the template is run.

    Raises:
        jinja2.TemplateError: it has an error.
    """
    return _ENVIRONMENT.parse(source)


def render_template(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """What a template writes.

    Raises:
        PromptTooLong: it writes too much.
        Exception: what any expression of a template can raise.
    """
    return _bounded_join(template.generate(variables))


def _bounded_join(chunks: Iterable[str]) -> str:
    parts, size = [], 0
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_PROMPT_CHARACTERS:
            raise PromptTooLong(
                f"the rendered conversation is longer than {MAX_PROMPT_CHARACTERS:,} characters"
            )
    return "".join(parts)


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
