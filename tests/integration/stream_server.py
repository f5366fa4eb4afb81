"""A server with an OpenAI-compatible stream of tokens at set times, for what measures servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from dataclasses import dataclass, field
from typing import Any, Literal, Self

Behaviour = Literal["answer", "refuse", "break off", "hang", "no stream", "no usage", "leave", "slam"]


@dataclass
class StreamServer:
    """Listens on 127.0.0.1 in a thread of its own. A context manager.

    Attributes:
        first, gap: seconds from a request to its first token, and between tokens.
        behaviour: "leave" closes a connection after its answer without having said so, "slam" at once.
        requests: the bodies it was sent; `headers`, theirs.
        num_connections: how many were made.
    """

    first: float = 0.0
    gap: float = 0.0
    behaviour: Behaviour = "answer"
    tls: ssl.SSLContext | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_connections: int = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        if self.behaviour == "slam":
            writer.close()
            return
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                if head[0].startswith("PRI"):
                    writer.write(_whole(400, {"error": "this is no HTTP/2 server"}))
                    await reader.read()  # closing with bytes unread would take the answer back
                    break
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if head[0].startswith("GET"):
                    writer.write(_whole(200, {"data": [{"id": "first"}, {"id": "second"}]}))
                    continue
                self.headers.append(headers)
                self.requests.append(json.loads(body))
                await self._answer(self.requests[-1], "chat" in head[0], writer)
                if self.behaviour in ("break off", "leave"):
                    break
        writer.close()

    async def _answer(self, request: dict[str, Any], chat: bool, writer: asyncio.StreamWriter) -> None:
        if self.behaviour == "refuse":
            writer.write(_whole(429, {"error": {"message": "the queue is full"}}))
            return
        if self.behaviour == "no stream":
            writer.write(_whole(200, {"choices": [{"text": "a whole answer"}]}))
            return
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        if chat:
            _event(writer, _choice(chat, {"role": "assistant", "content": ""}))
        await asyncio.sleep(3600 if self.behaviour == "hang" else self.first)
        count = request["max_tokens"]
        for number in range(count):
            if number and self.gap:
                await asyncio.sleep(self.gap)
            if self.behaviour == "break off" and number == 2:
                return
            _event(writer, _choice(chat, {"content": f"{number} "} if chat else f"{number} "))
        _event(writer, _choice(chat, {} if chat else "", "length"))
        if self.behaviour != "no usage":
            _event(writer, {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": count}})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def _choice(chat: bool, said: object, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta" if chat else "text": said, "finish_reason": reason}]}


def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    data = f"data: {json.dumps(event)}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _whole(status: int, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return b"HTTP/1.1 %d Said\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        status,
        len(data),
        data,
    )
