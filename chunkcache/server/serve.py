"""The app under uvicorn, with a graceful end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import uvicorn

from chunkcache.server.app import create_app

if TYPE_CHECKING:
    from chunkcache.hf import CachedModel


def serve(
    cached: CachedModel,
    *,
    model_name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Sequence[str] = (),
    queue_limit: int = 64,
    log_level: str = "info",
) -> None:
    """Serve until SIGINT or SIGTERM; requests that run then have ten seconds to finish.

    Raises:
        SystemExit: the port is taken.
    """
    app = create_app(cached, model_name=model_name, api_keys=api_keys, queue_limit=queue_limit)
    uvicorn.run(app, host=host, port=port, log_level=log_level, timeout_graceful_shutdown=10)
