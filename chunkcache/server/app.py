"""The routes.

Every completion goes through the same steps: fields, prompt ids, job, answer. Reading routes run in
a thread, because the wrapped model's lock may be held for a moment.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from chunkcache.engine import Runner
from chunkcache.errors import ChunkcacheError, ConfigError
from chunkcache.server.asks import Ask, read_ask, read_messages, read_prompts
from chunkcache.server.exchange import Exchange
from chunkcache.server.fields import Fields
from chunkcache.server.guard import KeyGuard
from chunkcache.server.metrics import Metrics
from chunkcache.server.problems import ApiError, as_api_error
from chunkcache.server.prompts import Prompts, ids_of
from chunkcache.server.shapes import ChatShape, Envelope, Shape, TextShape

if TYPE_CHECKING:
    from chunkcache.hf import CachedModel

_MOST_BODY = 32 * 2**20
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    cached: CachedModel,
    *,
    model_name: str,
    api_keys: Sequence[str] = (),
    queue_limit: int = 64,
    rows_at_once: int = 8,
) -> Starlette:
    """The server around a wrapped model, as an ASGI app; its worker stops with the app's lifespan.

    Args:
        cached: a model wrapped together with its tokenizer; the app alone runs it from now on.
        model_name: what clients call the model.
        api_keys: if any, every request needs one, except /health and the page at /.
        queue_limit: most requests that wait; more are answered 503.
        rows_at_once: most prompts (or `n`) of one request that run as one batch.

    Raises:
        ConfigError: the model has no tokenizer.
    """
    if cached.tokenizer is None:
        raise ConfigError("a server needs a tokenizer: wrap(model, tokenizer)")
    server = _Server(cached, model_name, queue_limit, rows_at_once)
    guard = [Middleware(KeyGuard, api_keys=tuple(api_keys))] if api_keys else []
    return Starlette(
        routes=server.routes(),
        middleware=guard,
        lifespan=server.lifespan,
        exception_handlers={
            ApiError: _answer_error,
            ChunkcacheError: _answer_error,
            HTTPException: _answer_http_error,
        },
    )


class _Server:
    def __init__(self, cached: CachedModel, model_name: str, queue_limit: int, rows_at_once: int):
        self._cached = cached
        self._name = model_name
        self._started = int(time.time())
        self._prompts = Prompts(cached)
        self._metrics = Metrics()
        self._runner = Runner(
            cached,
            queue_limit=queue_limit,
            rows_at_once=rows_at_once,
            on_end=self._metrics.count,
        )
        self._metrics.watch(cached, self._runner)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Nothing to start; the worker is stopped at the end."""
        try:
            yield
        finally:
            await run_in_threadpool(self._runner.close)
            await run_in_threadpool(self._cached.settle)

    def routes(self) -> list[Route]:
        """Every path."""
        return [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/stats", self.stats),
            Route("/tree", self.tree),
            Route("/history", self.history),
            Route("/metrics", self.metrics),
            Route("/reset_prefix_cache", self.reset, methods=["POST"]),
        ]

    async def chat(self, request: Request) -> Response:
        fields = Fields.parse(await _body(request))
        ask = read_ask(fields)
        self._check_model(ask.model)
        prompts = [await self._prompts.chat(read_messages(fields))]
        return await self._complete(request, ChatShape, ask, prompts, "messages")

    async def completions(self, request: Request) -> Response:
        fields = Fields.parse(await _body(request))
        ask = read_ask(fields)
        self._check_model(ask.model)
        prompts = [
            await self._prompts.ids(prompt) if isinstance(prompt, str) else prompt
            for prompt in read_prompts(fields)
        ]
        return await self._complete(request, TextShape, ask, prompts, "prompt")

    async def _complete(
        self, request: Request, shape: Shape, ask: Ask, prompts: list[list[int]], param: str
    ) -> Response:
        if not all(prompts):
            raise ApiError("the prompt has no token", param=param, code="invalid_prompt")
        room = self._prompts.room(prompts, ask.max_tokens, param)
        exchange = Exchange(self._runner, prompts, ask.sampling(room), ask.n)
        envelope = Envelope(shape, self._name)
        if ask.stream:
            return await exchange.stream(request, envelope, ask.include_usage)
        return await exchange.answer(request, envelope)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, object]:
        card = {"id": self._name, "object": "model", "created": self._started}
        return card | {"owned_by": "chunkcache", "max_model_len": self._prompts.limit}

    def _check_model(self, name: str | None) -> None:
        """A request without a name means the one model there is."""
        if name not in (None, self._name):
            message = f"the model '{name}' does not exist; this server has '{self._name}'"
            raise ApiError(message, status=404, param="model", code="model_not_found")

    async def tokenize(self, request: Request) -> Response:
        fields = Fields.parse(await _body(request))
        if fields.get("messages") is not None:
            ids = await self._prompts.chat(read_messages(fields))
        elif (text := fields.text("prompt")) is not None:
            special = fields.get("add_special_tokens") is None or fields.flag("add_special_tokens")
            ids = await self._prompts.ids(text, special)
        else:
            raise ApiError("give 'prompt' or 'messages'", param="prompt")
        limit = self._prompts.limit
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": limit})

    async def detokenize(self, request: Request) -> Response:
        fields = Fields.parse(await _body(request))
        return JSONResponse({"prompt": await self._prompts.text(ids_of(fields.get("tokens")))})

    async def health(self, request: Request) -> Response:
        alive = self._runner.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def stats(self, request: Request) -> Response:
        stats = await run_in_threadpool(self._cached.stats)
        return JSONResponse(stats.to_dict())

    async def tree(self, request: Request) -> Response:
        rows = await run_in_threadpool(self._cached.tree_rows)
        return JSONResponse([row.to_dict() for row in rows])

    async def history(self, request: Request) -> Response:
        trace = await run_in_threadpool(self._cached.history)
        return Response(trace, media_type="application/jsonl")

    async def metrics(self, request: Request) -> Response:
        page = await run_in_threadpool(self._metrics.page)
        return Response(page, headers={"content-type": _METRICS_TYPE})

    async def reset(self, request: Request) -> Response:
        dropped = await run_in_threadpool(self._cached.flush)
        return JSONResponse({"dropped_chunks": dropped})

    async def page(self, request: Request) -> Response:
        page = files("chunkcache.server").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(page)


async def _body(request: Request) -> bytes:
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > _MOST_BODY:
            raise ApiError(f"the body is longer than {_MOST_BODY} bytes", status=413)
    return bytes(raw)


async def _answer_error(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return ApiError(message, status=error.status_code, code=code).response()
