"""`chunkcache warm`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .loading import load
from .settings import announce, default_store, make_settings, settings_options, warn_of_budgets

if TYPE_CHECKING:
    from .preloads import Preload
    from .warming import Warmed, Warmer


@click.command(short_help="Compute prompts into a store ahead of time.")
@click.argument("model")
@click.option(
    "--prompts",
    "path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file of prompts, as `serve --preload` takes it; pin and ttl do not count here.",
)
@settings_options
@click.option(
    "--piece",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Tokens that are computed between two writes; who is killed loses no more.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    path: Path,
    dtype: str,
    stores: tuple[str, ...],
    as_json: bool,
    **o: Any,
) -> None:
    """Compute prompts into a store, where `serve` with the same options and store finds them.

    What a store has already is not computed again, so a run that was interrupted goes on. Exit code
    1 if a prompt could not be stored.
    """
    if any(name.startswith("memory:") for name in stores):
        raise click.UsageError("--store: memory ends with this command")
    from .preloads import read_preloads

    prompts = read_preloads(path)
    from chunkcache import wrap

    from .warming import Warmer, eager

    settings = make_settings(o, [eager(name) for name in stores or [default_store()]])
    loaded, tokenizer = load(model, dtype)
    with wrap(loaded, tokenizer, settings) as cached:
        announce(cached)
        warmed = _warm(Warmer(cached, o["piece"]), prompts)
        needed = sum(prompt.stored for prompt in warmed) * cached.stats().token_bytes
    warn_of_budgets(settings.stores, needed)
    _print(warmed, as_json)
    for line in _failures(warmed):
        click.echo(f"Error: {line}", err=True)
    if any(prompt.error for prompt in warmed):
        ctx.exit(1)


def _warm(warmer: Warmer, prompts: Sequence[Preload]) -> list[Warmed]:
    """What became of the prompts, one after another."""
    warmed = [warmer.read(prompt) for prompt in prompts]
    good = [prompt for prompt in warmed if not prompt.error]
    with _progress(sum(len(prompt.ids) for prompt in good)) as show:
        done = 0
        for prompt in good:
            warmer.warm(prompt, partial(show, prompt.name, done))
            done += len(prompt.ids)
    return warmed


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int, int], None]]:
    """Shows on stderr how many tokens are done: a bar on a terminal, lines elsewhere.

    It is told a prompt's name, the tokens of all prompts before, and how many of its own are done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:

        def line(name: str, before: int, done: int) -> None:
            click.echo(f"{name}: {before + done:,} of {total:,} tokens", err=True)

        yield line
        return
    text = TextColumn("{task.description}", markup=False)
    tokens = TextColumn("{task.completed:,} of {task.total:,} tokens")
    with Progress(text, BarColumn(), tokens, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda name, before, done: bar.update(task, description=name, completed=before + done)


def _print(warmed: Sequence[Warmed], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([prompt.to_dict() for prompt in warmed], indent=2))
        return
    from chunkcache.lab.views.tables import columns, console
    from chunkcache.lab.views.words import number

    names = ("prompt", "tokens", "stored", "found", "computed", "values written")
    rows = [
        (one.name, *map(number, (len(one.ids), one.stored, one.found, one.computed, one.values)))
        for one in warmed
    ]
    console().print(columns("Prompts", names, rows))


def _failures(warmed: Sequence[Warmed]) -> Iterator[str]:
    """What went wrong, a line each."""
    for one in warmed:
        if one.error:
            done = f" beyond {one.stored:,} tokens" if one.stored else ""
            yield f"{one.name} is not stored{done}: {one.error}"
    if not any(one.stored for one in warmed):
        yield "nothing could be written"
