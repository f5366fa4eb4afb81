"""The errors a request can end with.

Every error names what was wrong, what is allowed and, where there is one, the parameter at fault. Each
protocol maps the class to its own form: gRPC to a status code, HTTP to OpenAI's error object.
"""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """gRPC status code numbers (grpc.StatusCode without importing grpc)."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class PagewireError(Exception):
    """Base of all errors that reach a caller.

    Attributes:
        code: the gRPC status it maps to.
        message: for people: what was wrong, what is allowed, what to do.
        param: the request field at fault, if one is.
        retry_after: seconds after which the same request is likely to be taken, where that can be said.
    """

    code = Code.INTERNAL

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(PagewireError, ValueError):
    """The request can never succeed as sent."""

    code = Code.INVALID_ARGUMENT


class NotFound(PagewireError):
    """The request names something that is not there, such as an unknown model."""

    code = Code.NOT_FOUND


class Overloaded(PagewireError):
    """A bounded queue or size limit is full; the same request may succeed later."""

    code = Code.RESOURCE_EXHAUSTED


class DeadlineExceeded(PagewireError):
    """The request's deadline passed before it finished."""

    code = Code.DEADLINE_EXCEEDED


class Unavailable(PagewireError):
    """No engine is ready to serve, or the one that was serving is gone."""

    code = Code.UNAVAILABLE


class Unsupported(PagewireError):
    """A known feature that this server does not provide."""

    code = Code.UNIMPLEMENTED


class Unauthenticated(PagewireError):
    """The API key is missing or wrong."""

    code = Code.UNAUTHENTICATED


class ConfigError(PagewireError):
    """A setting or a model file is wrong; the process cannot start. Commands exit with status 2.

    The message may quote what a file holds. Whatever that is, it becomes one line of bounded length that a
    terminal can show.
    """

    code = Code.INVALID_ARGUMENT

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(_one_line(message), param=param)


_LONGEST_LINE = 800
_LINE_END = 200


def _one_line(text: str) -> str:
    """Escapes what cannot be printed, and leaves out the middle of a text that is too long: its beginning
    names the file, its end says what is allowed."""
    if len(text) > _LONGEST_LINE:
        text = f"{text[: _LONGEST_LINE - _LINE_END]} ... {text[-_LINE_END:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_BY_CODE: dict[int, type[PagewireError]] = {
    cls.code: cls
    for cls in (
        InvalidRequest,
        NotFound,
        Overloaded,
        DeadlineExceeded,
        Unavailable,
        Unsupported,
        Unauthenticated,
    )
}


def from_code(
    code: int, message: str, *, param: str | None = None, retry_after: float | None = None
) -> PagewireError:
    """The error for a gRPC status number received from another process, which may have named the field at
    fault. An empty name is none."""
    error = _BY_CODE.get(code, PagewireError)(message, param=param or None)
    error.retry_after = retry_after
    return error
