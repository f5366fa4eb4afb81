"""Server-sent events: how a stream begins, goes on and, if it must, fails."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from aiohttp import web

from pagewire.errors import PagewireError

logger = logging.getLogger(__name__)


async def send_events(
    http_request: web.Request,
    frames: AsyncGenerator[bytes, None],
    *,
    request_id: str,
    failed: Callable[[PagewireError], bytes],
) -> web.StreamResponse:
    """Writes frames as they come. Headers go out with the first, so that a request the scheduler refuses gets
    its proper status.

    Args:
        http_request: what is answered.
        frames: the events; empty ones only let the headers out.
        request_id: for logs.
        failed: makes the last frame of a stream that fails after it began; the connection is closed then.
    """
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }
    )
    try:
        async with aclosing(frames):
            async for frame in frames:
                if not response.prepared:
                    await response.prepare(http_request)
                if frame:
                    await response.write(frame)
    except PagewireError as error:
        if not response.prepared:
            raise
        await _fail(http_request, response, failed(error))
    except ConnectionError:
        logger.debug("request %s: the client is gone", request_id)
    except Exception:
        if not response.prepared:
            raise
        logger.exception("request %s failed while it was streamed", request_id)
        unexpected = PagewireError("internal error; the server's log has the details")
        await _fail(http_request, response, failed(unexpected))
    else:
        await response.write_eof()
    return response


async def _fail(http_request: web.Request, response: web.StreamResponse, frame: bytes) -> None:
    """The status went out long ago: a last frame, then the connection is closed."""
    response.force_close()
    await response.write(frame)
    await response.write_eof()
    if http_request.transport is not None:
        http_request.transport.close()
