"""`chunkcache serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .loading import dtype_option, load


@click.command(short_help="Serve MODEL to OpenAI clients.")
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--name", help="What clients call the model; by default the last part of MODEL.")
@click.option(
    "--device-bytes", default="2GiB", show_default=True, help="Budget of stored KV, as 512MiB."
)
@click.option("--chunk-size", type=click.IntRange(1, 1024), default=64, show_default=True)
@click.option(
    "--mode",
    type=click.Choice(["exact", "fast"]),
    default="exact",
    show_default=True,
    help="exact: the cache never changes an answer, bit for bit.",
)
@dtype_option
@click.option(
    "--preload",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file of prompts to compute before the first request.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="CHUNKCACHE_API_KEY",
    help="Require one of these keys; repeatable.",
)
@click.option(
    "--queue-limit", type=click.IntRange(1), default=64, show_default=True, help="Most waiting."
)
@click.option(
    "--store",
    "stores",
    multiple=True,
    help="A colder tier: disk:DIR or redis://HOST; repeatable, the fastest first.",
)
def command(
    model: str, dtype: str, preload: Path | None, stores: tuple[str, ...], **o: Any
) -> None:
    """Serve MODEL to OpenAI clients, reusing the beginnings that prompts share."""
    from .preloads import read_preloads

    prompts = read_preloads(preload) if preload else []
    from chunkcache import Config, wrap
    from chunkcache.server import serve

    settings = Config(
        mode=o["mode"],
        chunk_size=o["chunk_size"],
        device_bytes=o["device_bytes"],
        border=_border(o),
        stores=stores,
    )
    loaded, tokenizer = load(model, dtype)
    cached = wrap(loaded, tokenizer, settings)
    for prompt in prompts:
        tokens = cached.preload(prompt.prompt, name=prompt.name, pin=prompt.pin, ttl=prompt.ttl)
        click.echo(f"preloaded {prompt.name}: {tokens:,} tokens", err=True)
    serve(
        cached,
        model_name=o["name"] or Path(model).name,
        host=o["host"],
        port=o["port"],
        api_keys=o["api_keys"],
        queue_limit=o["queue_limit"],
    )


def _border(options: dict[str, Any]) -> int:
    """The multiple of the chunk size nearest above the default border."""
    chunk: int = options["chunk_size"]
    return -(-512 // chunk) * chunk
