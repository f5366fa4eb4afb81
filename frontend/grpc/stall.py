"""Ends calls whose clients read nothing for too long."""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType

import grpc.aio
from google.protobuf.message import Message

logger = logging.getLogger(__name__)


class StallWatch:
    """Cancels the task that entered it when one of its writes takes too long.

    A write that waits is one for which flow control leaves no room. The call is cancelled and not ended with
    a status, for that would wait behind the message.

    Attributes:
        writing_since: event loop time at which the write under way began; None between two writes.
    """

    def __init__(self, seconds: float, request_id: str) -> None:
        self.writing_since: float | None = None
        self._seconds = seconds
        self._request_id = request_id

    def __enter__(self) -> StallWatch:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._seconds, self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()

    async def write(self, context: grpc.aio.ServicerContext, message: Message) -> None:
        """Writes a message to the call.

        Raises:
            CancelledError: the call has ended, of which its tasks may not have been told yet.
        """
        self.writing_since = self._loop.time()
        try:
            await context.write(message)
        except grpc.aio.InternalError as error:
            raise asyncio.CancelledError("the call has ended") from error
        finally:
            self.writing_since = None

    def _look(self) -> None:
        now = self._loop.time()
        since = now if self.writing_since is None else self.writing_since
        if now - since < self._seconds:
            self._timer = self._loop.call_at(since + self._seconds, self._look)
            return
        logger.info("request %s: the client took nothing for %g s", self._request_id, self._seconds)
        self._task.cancel()
