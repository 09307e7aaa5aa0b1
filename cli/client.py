"""Reading from a running server, for the commands that take --url."""

from __future__ import annotations

import functools
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

import click

_TIMEOUT = 10


def server_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --url, --api-key and --json."""

    @click.option(
        "--url",
        default="http://127.0.0.1:8000",
        envvar="CHUNKCACHE_URL",
        show_default=True,
        help="Address of a running `chunkcache serve`.",
    )
    @click.option("--api-key", envvar="CHUNKCACHE_API_KEY", help="If the server asks for one.")
    @click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        command(*args, **kwargs)

    return wrapped


def fetch(url: str, path: str, api_key: str | None) -> Any:
    """The JSON at a path of a server.

    Raises:
        click.ClickException: no server there, or an answer other than JSON.
    """
    body = read(url, path, api_key)
    try:
        return json.loads(body)
    except ValueError as error:
        raise click.ClickException(f"cannot read {url.rstrip('/')}{path}: {error}") from error


def read(url: str, path: str, api_key: str | None) -> bytes:
    """What is at a path of a server.

    Raises:
        click.ClickException: no server there, or an error.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    where = url.rstrip("/") + path
    try:
        request = urllib.request.Request(where, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            body: bytes = response.read()
            return body
    except urllib.error.HTTPError as error:
        with error:
            raise click.ClickException(f"{where} answered {error.code} {error.reason}") from error
    except (OSError, ValueError, HTTPException) as error:
        raise click.ClickException(f"cannot read {where}: {error}") from error
