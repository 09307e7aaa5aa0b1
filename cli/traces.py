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
    from chunkcache.lab.traces.trace import BadLine, Trace

_SHOWN = 5  # bad lines


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def trace_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the argument TRACE, --tokenizer, --interleave and --block-size."""
    return click.argument("trace", type=FILE)(trace_options(command))


def trace_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --tokenizer, --interleave and --block-size."""

    @click.option(
        "--tokenizer",
        metavar="MODEL",
        help="Whose tokens those of the trace are; a chat log needs one.",
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


class Bad:
    """Lines that were left out: how many (`len`), and the first of them."""

    def __init__(self) -> None:
        self.first: list[BadLine] = []
        self._count = self._last = 0

    def __len__(self) -> int:
        return self._count

    def add(self, line: BadLine) -> None:
        """Counts one."""
        self._count += 1
        if len(self.first) < _SHOWN:
            self.first.append(line)

    def add_once(self, line: BadLine) -> None:
        """Counts one of a file that is read in order, maybe several times."""
        if line.number > self._last:
            self._last = line.number
            self.add(line)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Shows that something takes a while, in a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


@contextmanager
def opened(
    path: Path, tokenizer: str | None, interleave: int, block_size: int | None
) -> Iterator[tuple[Trace, Bad]]:
    """A trace, or what a tokenizer makes one of; and its bad lines, which come up while it is read.

    Raises:
        click.ClickException: no request in the file, no such tokenizer, or no dialogue in a log.
    """
    from chunkcache.errors import TraceError
    from chunkcache.lab.traces.trace import Trace

    bad = Bad()
    try:
        trace = Trace(path, block_size, on_bad=bad.add_once)
    except TraceError as error:
        if tokenizer is None:
            raise click.ClickException(f"{error}; or a chat log, with --tokenizer MODEL") from error
    else:
        yield trace, bad
        return
    with TemporaryDirectory() as folder:
        made = Path(folder, path.name)
        if not _record(path, made, load_tokenizer(str(tokenizer)), interleave, bad.add):
            tell(bad)
            raise click.ClickException(f"no dialogue of {path} could be read")
        yield Trace(made), bad


def _record(
    log: Path, made: Path, tokenizer: Any, together: int, note: Callable[[BadLine], object]
) -> int:
    """Makes a trace of a log; returns how many requests it has."""
    from rich.console import Console
    from rich.progress import track

    from chunkcache.lab.traces.dialogues import Asker, interleave, numbered_dialogues
    from chunkcache.lab.traces.recorder import Recorder

    asker = Asker(tokenizer)
    if asker.plain:
        click.echo(
            "Warning: the tokenizer has no chat template; a plain one takes its place", err=True
        )
    turns = interleave(asker.all_turns(numbered_dialogues(log, note), note), together)
    console = Console(stderr=True)
    shown = track(turns, "tokenizing", console=console, transient=True, total=None)
    count = 0
    with Recorder(made) as recorder:
        for turn in shown:
            recorder.write(turn.prompt, turn.answer)
            count += 1
    return count


def tell(bad: Bad) -> None:
    """Warns of lines that were left out."""
    for line in bad.first:
        click.echo(f"Warning: line {line.number} is left out: {line.why}", err=True)
    if len(bad) > len(bad.first):
        click.echo(
            f"Warning: {len(bad):,} lines are left out, of which these are the first", err=True
        )
