"""OpenAI's batch format: a request on each line of the input, an answer or an error on each of the output.

https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pagewire.base.errors import InvalidRequest
from pagewire.batch.lines import Line

ENDPOINTS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"),
    *("/v1/rerank", "/v1/score", "/v1/classify"),
)
_ID = "batch_req_"
OPENING = f'{{"id": "{_ID}'.encode()
"""What every line of the output begins with."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A line of the input.

    Attributes:
        line: where it is.
        custom_id: the caller's name for it; "" if it has none, which is an error.
        url: which of `ENDPOINTS`.
        body: what is sent there.
        error: why it is not sent, if it is not.
    """

    line: Line
    custom_id: str
    url: str = ""
    body: dict[str, Any] | None = None
    error: str | None = None

    @property
    def id(self) -> str:
        """What its answer is called. The same line in the same place has the same id in every run."""
        return _ID + self.line.key


class BatchReader:
    """Reads lines, and remembers their names.

    Args:
        model: what bodies that name no model ask for, if anything.
    """

    def __init__(self, model: str | None) -> None:
        self._model = model
        self._numbers: dict[str, int] = {}

    def read(self, line: Line) -> BatchRequest:
        """The request on a line, or what is wrong with it."""
        custom_id = ""
        try:
            fields = line.fields()
            name = fields.get("custom_id")
            custom_id = name if isinstance(name, str) else ""
            self._check_name(line, name)
            url, body = fields.get("url"), fields.get("body")
            _check(line, fields)
            assert isinstance(body, dict)
            if self._model is not None:
                body = {"model": self._model, **body}
            return BatchRequest(line, custom_id, str(url), body)
        except InvalidRequest as error:
            return BatchRequest(line, custom_id, error=error.message)

    def _check_name(self, line: Line, name: object) -> None:
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"line {line.number} has no custom_id; it must be a text of its own")
        first = self._numbers.setdefault(name, line.number)
        if first != line.number:
            raise InvalidRequest(
                f"line {line.number}: custom_id {name!r} is that of line {first}; each line must have its own"
            )


def _check(line: Line, fields: dict[str, Any]) -> None:
    where = f"line {line.number}"
    if fields.get("method", "POST") != "POST":
        raise InvalidRequest(f"{where}: method is {fields['method']!r}; it must be 'POST'")
    if fields.get("url") not in ENDPOINTS:
        raise InvalidRequest(
            f"{where}: url is {fields.get('url')!r}; it must be one of {', '.join(ENDPOINTS)}"
        )
    body = fields.get("body")
    if not isinstance(body, dict):
        raise InvalidRequest(f"{where}: body is missing or no object; it must be the request's JSON object")
    if body.get("stream"):
        raise InvalidRequest(f"{where}: body.stream is set; answers of a batch come whole, so leave it out")


def answered(request: BatchRequest, status: int, request_id: str, body: Any) -> bytes:
    """The output line of a request that was answered, which may have been by an error."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _line(request, response, None)


def refused(request: BatchRequest) -> bytes:
    """The output line of a request that was not sent."""
    return _line(request, None, {"code": "invalid_request", "message": request.error})


def id_of(output_line: bytes) -> str:
    """The id of a line that `answered` or `refused` made."""
    begin = output_line.index(b'"', len(b'{"id": ')) + 1
    return output_line[begin : output_line.index(b'"', begin)].decode(errors="replace")


def _line(request: BatchRequest, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    fields = {"id": request.id, "custom_id": request.custom_id or None, "response": response, "error": error}
    try:
        return json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a name with half of a surrogate pair
        return json.dumps(fields).encode()
