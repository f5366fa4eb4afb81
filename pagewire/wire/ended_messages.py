"""The scheduler's word that a request has ended, as an error of this package."""

from __future__ import annotations

from pagewire.base.errors import PagewireError, from_code
from pagewire.scheduler.v1 import scheduler_pb2


def error_in(ended: scheduler_pb2.Ended) -> PagewireError:
    """The error that a terminal message with the reason ERROR tells of."""
    retry_after = ended.retry_after if ended.HasField("retry_after") else None
    return from_code(ended.status, ended.error, param=ended.param, retry_after=retry_after)
