"""A server of HTTP for tests: aiohttp serves a folder in a thread, and counts requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Answered:
    """A request, and the server's answer.

    Attributes:
        method, path: of the request.
        range: the header ``Range``, or None.
        begin, end: when the request arrived, and when its answer began, in seconds.
        status: of the answer.
        size: bytes of the answer's body.
    """

    method: str
    path: str
    range: str | None
    begin: float
    end: float = 0.0
    status: int = 0
    size: int = 0


@dataclass
class FileServer:
    """A running server.

    Attributes:
        url: its address, without a final slash.
        pending: requests that are not answered yet.
        answered: all requests, in the order of their arrival.
        instead: if set, answers in place of the server; gets the request and the handler of the server.
        latency: seconds before each answer.
    """

    url: str = ""
    pending: dict[int, Answered] = field(default_factory=dict)
    answered: list[Answered] = field(default_factory=list)
    instead: Callable[[web.Request, Handler], Awaitable[web.StreamResponse]] | None = None
    latency: float = 0.0

    @property
    def size(self) -> int:
        """Bytes of all bodies."""
        return sum(one.size for one in self.answered)

    @property
    def rounds(self) -> int:
        """The greatest number of requests of which each began after the answer to the one before."""
        count, end = 0, 0.0
        for one in sorted(self.answered, key=lambda one: one.end):
            if one.begin >= end:
                count, end = count + 1, one.end
        return count

    def ranges(self) -> list[tuple[int, int]]:
        """Returns the requested ranges that have an explicit start: first and last byte, ascending."""
        given = [one.range.removeprefix("bytes=") for one in self.answered if one.range is not None]
        pairs = [text.split("-") for text in given if not text.startswith("-")]
        return sorted((int(first), int(last)) for first, last in pairs)

    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Counts a request, waits, and answers it."""
        one = Answered(request.method, request.path, request.headers.get("Range"), time.monotonic())
        self.answered.append(one)
        self.pending[id(request)] = one
        await asyncio.sleep(self.latency)
        if self.instead is not None:
            return await self.instead(request, handler)
        return await handler(request)

    async def prepared(self, request: web.Request, response: web.StreamResponse) -> None:
        """Records an answer, before its body is sent."""
        one = self.pending.pop(id(request))
        one.status, one.end = response.status, time.monotonic()
        one.size = 0 if request.method == "HEAD" else response.content_length or 0


@contextmanager
def serving(folder: Path, routes: Callable[[web.UrlDispatcher], None] | None = None) -> Iterator[FileServer]:
    """Serves the files of a folder on loopback, until the end of the block.

    Args:
        folder: the folder.
        routes: adds routes in place of that of the folder.
    """
    server, ready = FileServer(), threading.Event()
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await server.answer(request, handler)

        app = web.Application(middlewares=[middleware])
        app.on_response_prepare.append(server.prepared)
        if routes is None:
            app.router.add_static("/", folder)
        else:
            routes(app.router)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def run() -> None:
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    if not ready.wait(30):
        raise RuntimeError("the server did not start")
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
