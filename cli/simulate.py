"""`chunkcache simulate`."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .traces import opened, tell, trace_options

if TYPE_CHECKING:
    from chunkcache.lab.sweep import Case, Result, Sweep

_UNITS = {"": 1, "k": 10**3, "m": 10**6}
_WITHOUT = ("unlimited", "inf")


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
        if not names:
            self.fail("no policy is named", param, ctx)
        for name in names:
            if name != BELADY:
                try:
                    named_policy(name)
                except ConfigError as error:
                    self.fail(f"{error}, belady", param, ctx)
        return names


@click.command(short_help="Tell what a cache of any size would hit on a trace.")
@trace_options
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
    "--token-bytes", type=click.IntRange(1), help="Of the KV of a token; `chunkcache plan` knows."
)
@click.option("--jobs", type=click.IntRange(1), help="Processes; one for each core without it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    trace: Path,
    tokenizer: str | None,
    interleave: int,
    block_size: int | None,
    capacities: tuple[str, ...] | None,
    policies: tuple[str, ...],
    token_bytes: int | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Tell what a cache of any size would hit on TRACE, by policy.

    TRACE has a JSON object a line: hash_ids of blocks as Mooncake's traces do, or tokens, as serve --trace
    writes; with --tokenizer it is a chat log. The same tree and policies decide as in the live cache.
    Percentages are of what the optimum reaches.
    """
    sizes = _sizes(capacities, token_bytes)
    with opened(trace, tokenizer, interleave, block_size) as (source, bad):
        from chunkcache.lab.sweep import Case, Sweep

        sweep = Sweep(source, block_size)
        tell(bad)
        if not sweep.atoms.tokens:
            raise click.ClickException(f"no line of {trace} could be read")
        cases = [Case(*case) for case in product(policies, sizes or sweep.sizes())]
        results = _run(sweep, cases, jobs)
    from chunkcache.lab.render import console
    from chunkcache.lab.render_simulation import simulation, to_json

    if as_json:
        found = {"trace": str(trace)} | to_json(sweep, results) | {"bad_lines": len(bad)}
        click.echo(json.dumps(found, indent=2))
        return
    console().print(simulation(trace.name, sweep, results))


def _run(sweep: Sweep, cases: list[Case], jobs: int | None) -> list[Result]:
    """With a bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=len(cases))
        return sweep.run(cases, jobs, lambda: progress.advance(task))


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
