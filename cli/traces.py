"""Traces for the commands that read one: files of requests, or chat logs that a tokenizer makes one of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from .loading import load_tokenizer

if TYPE_CHECKING:
    from chunkcache.lab.trace import BadLine, Trace

_SHOWN = 5  # bad lines


def trace_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the argument TRACE, --tokenizer, --interleave and --block-size."""

    @click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
    @click.option(
        "--tokenizer",
        metavar="MODEL",
        help="TRACE is a chat log, for which MODEL has the tokenizer.",
    )
    @click.option(
        "--interleave",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Dialogues of a chat log that go on at the same time.",
    )
    @click.option(
        "--block-size",
        type=click.IntRange(1),
        help="Tokens of a block of the trace, or of a chunk where it has tokens. [512 or 64]",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        command(*args, **kwargs)

    return wrapped


@contextmanager
def opened(
    path: Path, tokenizer: str | None, interleave: int, block_size: int | None
) -> Iterator[tuple[Trace, dict[int, BadLine]]]:
    """A trace, and its bad lines by number, which fill up while it is read.

    Raises:
        TraceError: there is no request in the file.
        click.ClickException: no such tokenizer, or no dialogue in a log.
    """
    from chunkcache.lab.trace import Trace

    bad: dict[int, BadLine] = {}  # large files are read several times

    def note(line: BadLine) -> None:
        bad.setdefault(line.number, line)

    if tokenizer is None:
        yield Trace(path, block_size, on_bad=note), bad
        return
    with TemporaryDirectory() as folder:
        made = Path(folder, path.name)
        if not _record(path, made, load_tokenizer(tokenizer), interleave, note):
            tell(bad)
            raise click.ClickException(f"no dialogue of {path} could be read")
        yield Trace(made), bad


def _record(
    log: Path, made: Path, tokenizer: Any, together: int, note: Callable[[BadLine], object]
) -> int:
    """Makes a trace of a log; returns how many requests it has."""
    from rich.console import Console
    from rich.progress import track

    from chunkcache.lab.dialogues import Asker, interleave, numbered_dialogues
    from chunkcache.lab.recorder import Recorder

    asker = Asker(tokenizer)
    turns = interleave(asker.all_turns(numbered_dialogues(log, note), note), together)
    console = Console(stderr=True)
    shown = track(turns, "tokenizing", console=console, transient=True, total=None)
    count = 0
    with Recorder(made) as recorder:
        for count, turn in enumerate(shown, 1):
            recorder.write(turn.prompt, turn.answer, time=count)
    return count


def tell(bad: dict[int, BadLine]) -> None:
    """Warns of lines that were left out."""
    for line in list(bad.values())[:_SHOWN]:
        click.echo(f"Warning: line {line.number} is left out: {line.why}", err=True)
    if len(bad) > _SHOWN:
        click.echo(
            f"Warning: {len(bad):,} lines are left out, of which these are the first", err=True
        )
