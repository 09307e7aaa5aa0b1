"""Errors as OpenAI clients expect them: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from chunkcache.errors import (
    ClosedError,
    PromptError,
    PromptTooLongError,
    QueueFullError,
    UnsupportedRequestError,
)


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        param: the field of the request that is at fault, if it is one.
        code: a stable word for programs.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
        return JSONResponse(self.body(), self.status, headers.get(self.status))


def as_api_error(error: Exception) -> ApiError:
    """What a failed job tells its client; causes inside the server are named, not described."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return ApiError(str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, PromptError | UnsupportedRequestError):
        return ApiError(str(error), code="invalid_prompt")
    if isinstance(error, QueueFullError):
        return ApiError(str(error), status=503, code="queue_full")
    if isinstance(error, ClosedError):
        return ApiError(str(error), status=503, code="shutting_down")
    name = type(error).__name__
    return ApiError(f"internal error ({name}); see the server's log", status=500, code="internal")
