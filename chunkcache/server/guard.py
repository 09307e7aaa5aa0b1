"""API keys: one ASGI layer in front of everything but what a load balancer or a browser needs."""

from __future__ import annotations

import hmac

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from chunkcache.server.problems import ApiError

_OPEN = ("/health", "/")


class KeyGuard:
    """Lets requests with one of the keys through, as `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]):
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN or self._allows(Request(scope)):
            await self._app(scope, receive, send)
            return
        error = ApiError("missing or wrong API key", status=401, code="invalid_api_key")
        await error.response()(scope, receive, send)

    def _allows(self, request: Request) -> bool:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode()
        # No early exit: the time taken tells nothing about the keys.
        equal = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(equal)
