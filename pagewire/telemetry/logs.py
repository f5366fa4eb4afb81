"""Logs of a process: lines for people, or a JSON object a line."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

from pagewire.telemetry.context import CURRENT_REQUEST

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
FIELDS = "fields"
"""The name in `extra` of a log call for a dict whose entries become members of the JSON object."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line.

    Members: time (RFC 3339, UTC), level, logger, process, pid and message; request_id and trace_id if the
    line is about a request; exception if there is one; and whatever the caller gave as FIELDS.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process
        self._pid = os.getpid()

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": self._process,
            "pid": self._pid,
            "message": record.getMessage(),
        }
        request = CURRENT_REQUEST.get()
        if request is not None:
            entry["request_id"] = request.request_id
            if request.trace is not None:
                entry["trace_id"] = request.trace.trace_id
        entry.update(getattr(record, FIELDS, {}))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json.dumps(entry, ensure_ascii=False, default=str)


def about(request_id: str, trace_id: str | None = None, **more: Any) -> dict[str, Any]:
    """`extra` for a log call about a request that is not the current task's."""
    fields: dict[str, Any] = {"request_id": request_id, **more}
    if trace_id:
        fields["trace_id"] = trace_id
    return {FIELDS: fields}


def log_to_stderr(log_format: str, process: str) -> None:
    """Sets up the root logger of this process.

    Args:
        log_format: "text" or "json".
        process: what kind of process this is, for JSON.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else logging.Formatter(TEXT_FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
