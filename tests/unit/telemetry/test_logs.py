"""Logs as JSON objects."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime

from pagewire.telemetry.context import CURRENT_REQUEST, RequestContext, TraceContext
from pagewire.telemetry.logs import JsonFormatter, about


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("some.logger", logging.WARNING, "file.py", 1, message, arguments, None)
    vars(made).update(extra)
    return made


def test_a_line_is_an_object_with_time_level_process_and_message() -> None:
    line = JsonFormatter("scheduler").format(record("a %s\nof two lines", "text"))
    assert "\n" not in line
    entry = json.loads(line)
    assert entry["message"] == "a text\nof two lines"
    assert (entry["level"], entry["logger"], entry["process"]) == ("WARNING", "some.logger", "scheduler")
    assert datetime.fromisoformat(entry["time"]).tzinfo is not None
    assert "request_id" not in entry


def test_a_line_of_a_request_has_its_ids() -> None:
    token = CURRENT_REQUEST.set(RequestContext("r-1", 0.0, TraceContext("t" * 32, "s" * 16)))
    try:
        entry = json.loads(JsonFormatter("frontend").format(record("x")))
    finally:
        CURRENT_REQUEST.reset(token)
    assert (entry["request_id"], entry["trace_id"]) == ("r-1", "t" * 32)


def test_a_caller_may_name_another_request_and_add_members() -> None:
    entry = json.loads(JsonFormatter("scheduler").format(record("x", **about("r-2", None, code=3))))
    assert (entry["request_id"], entry["code"]) == ("r-2", 3)
    assert "trace_id" not in entry


def test_an_exception_is_in_the_object() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        made = record("failed", exc_info=sys.exc_info())
    assert "ValueError: broken" in json.loads(JsonFormatter("frontend").format(made))["exception"]
