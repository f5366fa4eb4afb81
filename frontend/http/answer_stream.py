"""Streams an answer: its events are rendered where they arise, and written as they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from aiohttp import web

from frontend.generation.answer import Answer
from frontend.generation.events import Event
from frontend.http.event_stream import EventStream
from pagewire.base.errors import PagewireError

Frames = Callable[[Sequence[Event], Answer], bytes]
"""Renders a round of events; may return nothing."""


async def send_answer(
    stream: EventStream,
    answer: Answer,
    frames_of: Frames,
    *,
    failed: Callable[[PagewireError], bytes],
    begins_with_text: bool = False,
) -> web.StreamResponse:
    """Sends all of an answer.

    Args:
        stream: where to.
        answer: what is read.
        frames_of: renders its events.
        failed: see `EventStream.send`.
        begins_with_text: whether the status waits for the first frame that is not empty, instead of going
            out once the request is taken.
    """

    async def frames() -> AsyncGenerator[bytes, None]:
        async with aclosing(answer.rounds(StreamSink(stream, answer, frames_of))) as rounds:
            async for events in rounds:
                rendered = frames_of(events, answer)
                if rendered or not begins_with_text:
                    yield rendered

    return await stream.send(frames(), failed=failed)


class StreamSink:
    """Renders an answer's events where they arise. See Sink."""

    def __init__(self, stream: EventStream, answer: Answer, frames_of: Frames) -> None:
        self._stream = stream
        self._answer = answer
        self._frames_of = frames_of
        self.ready = stream.ready

    def take(self, events: Sequence[Event]) -> None:
        frames = self._frames_of(events, self._answer)
        if frames:
            self._stream.write(frames)
