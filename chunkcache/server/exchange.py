"""One HTTP request and its job: events cross from the worker's thread, a lost client cancels."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from chunkcache.engine import Delta, Event, Failed, Finished, Job, Result, Runner, Sampling
from chunkcache.server.problems import as_api_error
from chunkcache.server.shapes import Envelope, cached_tokens, reuse, usage

_CLIENT_GONE = 499  # nginx's word for it; nobody is left to read it


class Exchange:
    """Runs a job for a client of the running event loop."""

    def __init__(self, runner: Runner, prompts: list[list[int]], sampling: Sampling, n: int):
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._runner = runner
        self._job = Job(prompts, sampling, self._hear, n)
        self.rows = n * len(prompts)

    async def answer(self, request: Request, envelope: Envelope) -> Response:
        """The whole answer at once."""
        try:
            self._runner.submit(self._job)
            while not isinstance(event := await self._next(request), Finished):
                if event is None:
                    return Response(status_code=_CLIENT_GONE)
                if isinstance(event, Failed):
                    return as_api_error(event.error).response()
        finally:
            self.close()
        hits = {"x-chunkcache-hit-tokens": str(cached_tokens(event.result))}
        return JSONResponse(envelope.whole(event.result), headers=hits)

    async def stream(self, request: Request, envelope: Envelope, include_usage: bool) -> Response:
        """The answer in pieces, once the first has come: earlier failures get a status."""
        try:
            self._runner.submit(self._job)
            first = await self._next(request)
        except BaseException:
            self.close()
            raise
        if first is None:
            self.close()
            return Response(status_code=_CLIENT_GONE)
        if isinstance(first, Failed):
            return as_api_error(first.error).response()
        return _EventStream(self, self._lines(first, envelope, include_usage))

    def close(self) -> None:
        """The client is served or gone: stop the job if it still waits or runs."""
        self._runner.cancel(self._job)

    def _hear(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and its clients with it
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _next(self, request: Request) -> Event | None:
        """The next event; None if the client went away before it came."""
        event = asyncio.ensure_future(self._events.get())
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
            return event.result() if event.done() else None
        finally:
            event.cancel()
            gone.cancel()

    async def _lines(
        self, event: Event, envelope: Envelope, with_usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events; if `with_usage` the last has it, and the others have it as null."""
        empty: dict[str, Any] = {"usage": None} if with_usage else {}
        for row in range(self.rows):
            if (opening := envelope.shape.opening(row)) is not None:
                yield _line(envelope.chunk(opening, **empty))
        while isinstance(event, Delta):
            if event.text:
                choice = envelope.shape.piece(event.row, event.text, None)
                yield _line(envelope.chunk(choice, **empty))
            if event.finish_reason:
                choice = envelope.shape.piece(event.row, "", event.finish_reason)
                yield _line(envelope.chunk(choice, **empty))
            event = await self._events.get()
        if isinstance(event, Failed):
            yield _line(as_api_error(event.error).body())
            return
        if with_usage:
            yield _line(_closing(envelope, event.result))
        yield "data: [DONE]\n\n"


def _closing(envelope: Envelope, result: Result) -> dict[str, Any]:
    return envelope.chunk(usage=usage(result), chunkcache=reuse(result))


def _line(message: dict[str, Any]) -> str:
    return f"data: {json.dumps(message, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """A stream that closes its exchange however it ends."""

    def __init__(self, exchange: Exchange, lines: AsyncIterator[str]):
        super().__init__(
            lines, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.close()
