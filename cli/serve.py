"""`chunkcache serve`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chunkcache.errors import StoreDownError

from .loading import load
from .settings import announce, default_store, make_settings, settings_options

if TYPE_CHECKING:
    from chunkcache import CachedModel, Config, Recorder


@click.command(short_help="Serve MODEL to OpenAI clients.")
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--name", help="What clients call the model; by default the last part of MODEL.")
@settings_options
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
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Add every prompt to FILE, as token ids, for simulate and report.",
)
@click.option(
    "--trace-hashes", is_flag=True, help="Record salted hashes of chunks: no text leaves."
)
@click.option(
    "--trace-salt", help="Of the hashes, so that a restart goes on with the trace; else random."
)
@click.option("--no-store", is_flag=True, help="Keep prefixes in memory only.")
def command(
    model: str,
    dtype: str,
    preload: Path | None,
    stores: tuple[str, ...],
    no_store: bool,
    trace: Path | None,
    trace_hashes: bool,
    trace_salt: str | None,
    **o: Any,
) -> None:
    """Serve MODEL to OpenAI clients, reusing the beginnings that prompts share.

    What is stored is kept on disk too, so that the next start is warm.
    """
    if stores and no_store:
        raise click.UsageError("--store and --no-store exclude each other")
    if trace_hashes and trace is None:
        raise click.UsageError("--trace-hashes needs --trace FILE")
    from .preloads import read_preloads

    prompts = read_preloads(preload) if preload else []
    from chunkcache.server import serve

    settings = make_settings(o, stores if stores or no_store else [default_store()])
    recorder = _recorder(trace, settings.chunk_size if trace_hashes else None, trace_salt)
    loaded, tokenizer = load(model, dtype)
    cached = _wrap(loaded, tokenizer, settings, recorder, chosen=bool(stores))
    announce(cached)
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


def _recorder(trace: Path | None, block: int | None, salt: str | None) -> Recorder | None:
    """What writes the trace, before anything slow happens."""
    if trace is None:
        return None
    from chunkcache.lab.traces.recorder import Recorder

    return Recorder(trace, block, None if salt is None else salt.encode())


def _wrap(
    loaded: Any, tokenizer: Any, settings: Config, recorder: Recorder | None, chosen: bool
) -> CachedModel:
    """The wrapped model; without stores if those that nobody chose cannot be used."""
    from chunkcache import wrap

    try:
        return wrap(loaded, tokenizer, settings, recorder)
    except StoreDownError as error:
        if chosen:
            raise
        click.echo(f"Warning: prefixes are not kept on disk: {error}", err=True)
        return wrap(loaded, tokenizer, replace(settings, stores=()), recorder)
