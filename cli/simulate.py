"""`chunkcache simulate`."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import click

_UNITS = {"": 1, "k": 10**3, "m": 10**6}
_WITHOUT = ("unlimited", "inf")
_SHOWN = 5  # bad lines


class _Capacities(click.ParamType[tuple[str, ...]]):
    """Sizes with commas between: tokens as 512k,5M, bytes as 16GiB, or unlimited."""

    name = "sizes"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        """The sizes as they were written."""
        if isinstance(value, tuple):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())


class _Policies(click.ParamType[tuple[str, ...]]):
    """Names of policies with commas between."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        """The names, all of which are known."""
        from chunkcache.errors import ConfigError
        from chunkcache.lab.sweep import BELADY
        from chunkcache.tree import named_policy

        if isinstance(value, tuple):
            return value
        names = tuple(part.strip().lower() for part in value.split(",") if part.strip())
        for name in names:
            if name != BELADY:
                try:
                    named_policy(name)
                except ConfigError as error:
                    self.fail(f"{error}, belady", param, ctx)
        return names


@click.command(short_help="Tell what a cache of any size would hit on a trace.")
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--capacity",
    "capacities",
    type=_Capacities(),
    help="Tokens as 512k,5M; bytes as 16GiB (with --token-bytes); unlimited. "
    "Without it, parts of all different tokens.",
)
@click.option(
    "--policy",
    "policies",
    type=_Policies(),
    default="lru,belady",
    show_default=True,
    help="lru, lfu, slru, 2q, s3fifo, arc, pgdsf, gdlf, ttl:SECONDS; belady knows the future.",
)
@click.option(
    "--block-size",
    type=click.IntRange(1),
    help="Tokens of a block of the trace, or of a chunk where it has tokens. [512 or 64]",
)
@click.option(
    "--token-bytes", type=click.IntRange(1), help="Of the KV of a token; `chunkcache plan` knows."
)
@click.option("--jobs", type=click.IntRange(1), help="Processes; one for each core without it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    trace: Path,
    capacities: tuple[str, ...] | None,
    policies: tuple[str, ...],
    block_size: int | None,
    token_bytes: int | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Tell what a cache of any size would hit on TRACE, by policy.

    TRACE has a JSON object a line: hash_ids of blocks as Mooncake's traces do, or tokens. The same tree
    and policies decide as in the live cache. Percentages are of what the optimum reaches.
    """
    from rich.progress import Progress

    from chunkcache.lab.render import console
    from chunkcache.lab.render_simulation import simulation, to_json
    from chunkcache.lab.sweep import Case, Sweep
    from chunkcache.lab.trace import BadLine, Trace

    sizes = _sizes(capacities, token_bytes)
    bad: dict[int, BadLine] = {}  # by number, since large files are read several times
    source = Trace(trace, block_size, on_bad=lambda line: bad.setdefault(line.number, line))
    sweep = Sweep(source, block_size)
    _tell(list(bad.values()))
    cases = [Case(*case) for case in product(policies, sizes or sweep.sizes())]
    with Progress(console=_stderr(), transient=True) as progress:
        task = progress.add_task("simulating", total=len(cases))
        results = sweep.run(cases, jobs, lambda: progress.advance(task))
    if as_json:
        click.echo(json.dumps(to_json(sweep, results) | {"bad_lines": len(bad)}, indent=2))
        return
    console().print(simulation(sweep, results))


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _sizes(capacities: tuple[str, ...] | None, token_bytes: int | None) -> list[int | None]:
    """Tokens; None is without limit."""
    return [_size(one, token_bytes) for one in capacities or ()]


def _size(text: str, token_bytes: int | None) -> int | None:
    if text.lower() in _WITHOUT:
        return None
    if found := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([km]?)", text.lower()):
        return int(float(found[1]) * _UNITS[found[2]])
    from chunkcache.config import parse_bytes
    from chunkcache.errors import ConfigError

    try:
        size = parse_bytes(text)
    except ConfigError as error:
        raise click.BadParameter(
            f"{text!r} is no size: tokens as 512k or 5M, bytes as 16GiB, or unlimited",
            param_hint="--capacity",
        ) from error
    if token_bytes is None:
        raise click.UsageError(
            f"--capacity {text} needs --token-bytes: see `chunkcache plan MODEL`"
        )
    return size // token_bytes


def _tell(bad: list[Any]) -> None:
    """Lines that are no requests."""
    for line in bad[:_SHOWN]:
        click.echo(f"Warning: line {line.number} is left out: {line.why}", err=True)
    if len(bad) > _SHOWN:
        click.echo(
            f"Warning: {len(bad):,} lines are left out, of which these are the first", err=True
        )
