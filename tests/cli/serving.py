"""`chunkcache serve demo` as a process of its own, and a client of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import pytest

from chunkcache.demo.facts import HELD_OUT_SEED, make_shop

KEY = "sesame"
SHOP = make_shop(HELD_OUT_SEED, fact_tokens=200)
SMALL = ("--chunk-size", "32", "--device-bytes", "32MiB")


@contextmanager
def serving(
    *options: str, caches: Path | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server's address and process.

    Args:
        caches: where the user's caches are; a folder for this server alone if None. What the server
            says on stderr is in `log` beside it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "chunkcache", "serve", "demo", "--port", str(port)]
    with TemporaryDirectory() as own:
        caches = caches or Path(own, "caches")
        environment = os.environ | {"CHUNKCACHE_API_KEY": KEY, "XDG_CACHE_HOME": str(caches)}
        with (
            open(caches.parent / "log", "wb") as log,
            subprocess.Popen([*command, *SMALL, *options], env=environment, stderr=log) as process,
        ):
            url = f"http://127.0.0.1:{port}"
            try:
                _wait(url, process)
                yield url, process
            finally:
                process.kill()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        try:
            httpx2.get(f"{url}/health")
            return
        except httpx2.ConnectError:
            time.sleep(0.2)
    pytest.fail("the server did not come up")


def ask(url: str, number: int) -> dict:
    """The answer to a question to the shop."""
    messages = [
        {"role": "system", "content": SHOP.system_prompt},
        {"role": "user", "content": SHOP.questions[number].question},
    ]
    body = {"model": "demo", "messages": messages, "max_tokens": 24}
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx2.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60).json()


def cached_tokens(answer: dict) -> int:
    """Of its prompt."""
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]
