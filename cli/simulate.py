"""`chunkcache simulate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .sizes import read_size
from .traces import opened, tell, trace_argument

if TYPE_CHECKING:
    from chunkcache.lab.simulation.cases import Case, Setup
    from chunkcache.lab.simulation.sweep import Result, Sweep

_LARGE = 2 * 2**30  # bytes of a file whose requests, looked at as a whole, take gigabytes of memory


class _List(click.ParamType[tuple[str, ...]]):
    """Parts with commas between, as they were written."""

    name = "list"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        """The parts that are not empty."""
        if isinstance(value, tuple):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())


class _Capacities(_List):
    """Sizes: tokens as 512k,5M, bytes as 16GiB, or unlimited."""

    name = "sizes"


class _Names(_List):
    """At least one name, all of which are known."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        """The names in lower case."""
        from chunkcache.errors import ConfigError

        names = tuple(name.lower() for name in super().convert(value, param, ctx))
        if not names:
            self.fail("none is named", param, ctx)
        for name in names:
            try:
                self.check(name)
            except ConfigError as error:
                self.fail(str(error), param, ctx)
        return names

    def check(self, name: str) -> None:
        """Raises ConfigError for what is not known."""
        raise NotImplementedError


class _Policies(_Names):
    def check(self, name: str) -> None:
        """See the base class."""
        from chunkcache.errors import ConfigError
        from chunkcache.lab.simulation.sweep import BELADY
        from chunkcache.tree import named_policy

        if name != BELADY:
            try:
                named_policy(name)
            except ConfigError as error:
                raise ConfigError(f"{error}, belady") from error


class _Routers(_Names):
    def check(self, name: str) -> None:
        """See the base class."""
        from chunkcache.lab.simulation.fleet import named_router

        named_router(name)


class _Tier(click.ParamType[tuple[str, str]]):
    """A name and a size, as in host=5M."""

    name = "name=size"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        """Both, as they were written."""
        if isinstance(value, tuple):
            return value
        name, _, size = (part.strip() for part in value.partition("="))
        if not name or not size:
            self.fail(f"{value!r} is no tier: write for example host=5M", param, ctx)
        return name, size


@click.command(short_help="Tell what a cache of any size would hit on a trace.")
@trace_argument
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
    help="lru, lfu, slru, 2q, s3fifo, arc, pgdsf, gdlf, ttl:SECONDS; belady knows the future. "
    "[default: lru,belady; with --stream lru]",
)
@click.option(
    "--token-bytes", type=click.IntRange(1), help="Of the KV of a token; `chunkcache plan` knows."
)
@click.option(
    "--tier",
    "tiers",
    type=_Tier(),
    multiple=True,
    help="A tier behind the device, whose size --capacity is: host=5M; repeat it, the faster first. "
    "Replicas share it.",
)
@click.option(
    "--admit",
    type=click.IntRange(1),
    help="Write to tiers what so many requests used, the first one included.  [default: 1]",
)
@click.option(
    "--replicas",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Servers behind a router, each with a cache of its own of that capacity.",
)
@click.option(
    "--router",
    "routers",
    type=_Routers(),
    help="random, round-robin, prefix (the longest match), prefix+load (the least to compute, with "
    "what was sent there in the last 180 s).  [default: prefix]",
)
@click.option("--seed", default=0, show_default=True, help="Of the router random.")
@click.option(
    "--stream",
    is_flag=True,
    help="Hold no more of TRACE in memory than the caches do. Needs --capacity; without belady.",
)
@click.option("--jobs", type=click.IntRange(1), help="Processes; one for each core without it.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a figure of hit rates by capacity: .svg, .png or .pdf.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    trace: Path,
    tokenizer: str | None,
    interleave: int,
    block_size: int | None,
    capacities: tuple[str, ...] | None,
    policies: tuple[str, ...] | None,
    token_bytes: int | None,
    tiers: tuple[tuple[str, str], ...],
    admit: int | None,
    replicas: int,
    routers: tuple[str, ...] | None,
    seed: int,
    stream: bool,
    jobs: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Tell what a cache of any size would hit on TRACE, by policy.

    TRACE has a JSON object a line: hash_ids of blocks as Mooncake's traces do, or tokens, as serve --trace
    writes; with --tokenizer it is a chat log. The same tree and policies decide as in the live cache.
    Percentages are of what the optimum reaches.
    """
    sizes = [read_size(one, token_bytes, "--capacity") for one in capacities or ()]
    setup = _setup(tiers, token_bytes, admit, replicas, seed)
    policies = policies or (("lru",) if stream else ("lru", "belady"))
    routes = _routes(routers, replicas)
    if stream:
        _check_stream(sizes, policies, setup)
    with opened(trace, tokenizer, interleave, block_size) as (source, bad):
        from chunkcache.lab.simulation.sweep import Sweep

        sweep = Sweep(source, block_size, setup, stream)
        if not stream and source.path.stat().st_size > _LARGE:
            click.echo(f"Hint: {trace} is large; --stream needs less memory for it", err=True)
        try:
            cases = _cases(policies, sizes or sweep.sizes(), routes)
            results = _run(sweep, cases, jobs)
        finally:
            tell(bad)
    if not results[0].requests:
        raise click.ClickException(f"no line of {trace} could be read")
    if plot is not None:
        from chunkcache.lab.views.figures import of_results, save

        save(of_results(results, None if stream else sweep.footprint), plot)
        click.echo(f"{plot} is written", err=True)
    from chunkcache.lab.views.simulation import simulation, to_json
    from chunkcache.lab.views.tables import console

    if as_json:
        found = {"trace": str(trace)} | to_json(sweep, results) | {"bad_lines": len(bad)}
        click.echo(json.dumps(found, indent=2))
        return
    console().print(simulation(trace.name, sweep, results))


def _setup(
    tiers: Sequence[tuple[str, str]],
    token_bytes: int | None,
    admit: int | None,
    replicas: int,
    seed: int,
) -> Setup:
    from chunkcache.lab.simulation.cases import Setup
    from chunkcache.lab.simulation.simulator import DEVICE

    names = [DEVICE, *(name for name, _ in tiers)]
    if len(set(names)) < len(names):
        raise click.UsageError(f"tiers need different names, other than {DEVICE}")
    if admit is not None and not tiers:
        raise click.UsageError("--admit says what is written to a --tier, and there is none")
    sized = tuple((name, read_size(size, token_bytes, "--tier")) for name, size in tiers)
    return Setup(replicas, sized, admit or 1, seed)


def _routes(routers: tuple[str, ...] | None, replicas: int) -> Sequence[str | None]:
    """Routers to try; None between one replica and itself."""
    if replicas > 1:
        return routers or ("prefix",)
    if routers:
        raise click.UsageError("--router needs several --replicas")
    return (None,)


def _check_stream(sizes: Sequence[int | None], policies: Sequence[str], setup: Setup) -> None:
    from chunkcache.lab.simulation.sweep import BELADY

    if not sizes:
        raise click.UsageError("--stream needs --capacity: sizes to try come from the whole trace")
    if BELADY in policies:
        raise click.UsageError("--stream goes without belady, which needs the whole trace")
    if None in sizes or None in dict(setup.tiers).values():
        raise click.UsageError("--stream goes without unlimited sizes, which hold the whole trace")


def _cases(
    policies: Sequence[str], sizes: Sequence[int | None], routes: Sequence[str | None]
) -> list[Case]:
    from chunkcache.lab.simulation.cases import Case
    from chunkcache.lab.simulation.sweep import BELADY

    cases = [
        Case(policy, size, None if policy == BELADY else route)
        for policy, size, route in product(policies, sizes, routes)
    ]
    return list(dict.fromkeys(cases))  # the optimum has no router


def _run(sweep: Sweep, cases: list[Case], jobs: int | None) -> list[Result]:
    """With a bar on stderr, or a count of requests where nobody knows how many come."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=None if sweep.stream else len(cases))

        def read(number: int) -> None:
            progress.update(task, description=f"simulating, {number:,} requests")

        return sweep.run(cases, jobs, lambda: progress.advance(task), read)
