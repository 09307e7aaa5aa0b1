"""`chunkcache store`: looking after a colder tier, also while others use it."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import click

from .settings import default_store

if TYPE_CHECKING:
    from chunkcache.kv.inventory import Inventory
    from chunkcache.kv.survey import Progress
    from chunkcache.stores import Key, Store

_TOGETHER = 512  # values that are removed at once
_NO_LIMIT = 2**60  # bytes; a budget that is not named here must not make anything leave


@click.group(short_help="Look after stored prefixes.")
def command() -> None:
    """Look after a colder tier: what lies in it, whether it is whole, and what may go.

    STORE is what `chunkcache serve` takes, disk:DIR or redis://HOST; by default the folder in the
    user's cache. Others may use it at the same time, and looking at values counts as no use.
    """


def _store_option(function: Callable[..., None]) -> Callable[..., None]:
    """Adds --store, and hands the function the open store and what it is called."""

    @click.option(
        "--store",
        "name",
        metavar="STORE",
        envvar="CHUNKCACHE_STORE",
        help="disk:DIR or redis://HOST.  [default: a folder in the user's cache]",
    )
    @functools.wraps(function)
    def wrapped(*args: Any, name: str | None, **kwargs: Any) -> None:
        from chunkcache.stores.open import open_store
        from chunkcache.stores.places import shown

        full = _existing(name or default_store())
        store = open_store(full)
        try:
            function(*args, store=store, where=shown(full), **kwargs)
        finally:
            store.close()

    return wrapped


def _existing(name: str) -> str:
    """The name of a store that is there; a folder that holds none is not made one."""
    kind, _, rest = name.partition(":")
    if kind == "memory":
        raise click.ClickException("a memory store is part of its process; see its /metrics")
    folder, mark, query = rest.partition("?")
    if kind != "disk" or not folder:
        return name
    if not (Path(folder).expanduser() / "values").is_dir():
        raise click.ClickException(f"there is no store in {folder}")
    if "budget" in dict(parse_qsl(query)):
        return name
    return f"{name}{'&' if mark else '?'}budget={_NO_LIMIT}"


_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON instead of a table."
)


@command.command("ls", short_help="List stored prefixes.")
@_store_option
@_json_option
def ls(store: Store, where: str, as_json: bool) -> None:
    """List stored prefixes, the one used last first.

    Prompts that begin with the same chunk are one line. Tokens are those of all chunks behind it.
    """
    from chunkcache.kv.inventory import take_inventory

    rows = [family.to_dict() for family in take_inventory(store).families]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from chunkcache.lab.views.store import families, shortest
    from chunkcache.lab.views.tables import console

    digits = shortest([row["group"] for row in rows], 12)
    console().print(families(where, rows, digits, time.time()))


@command.command("stat", short_help="Show what a store holds.")
@_store_option
@_json_option
def stat(store: Store, where: str, as_json: bool) -> None:
    """Show what a store holds: values, bytes, tokens, and what a token takes."""
    from chunkcache.kv.inventory import take_inventory
    from chunkcache.kv.totals import totals

    stats = store.stats()
    budget = None if stats.policy is not None or stats.budget == _NO_LIMIT else stats.budget
    found = totals(take_inventory(store), stats, budget)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from chunkcache.lab.views import store as views
    from chunkcache.lab.views.tables import console

    console().print(views.totals(where, found, time.time()))


@command.command("verify", short_help="Read every value, and say which are damaged.")
@_store_option
@_json_option
@click.pass_context
def verify(ctx: click.Context, store: Store, where: str, as_json: bool) -> None:
    """Read every value, and say which are damaged, lost, or out of reach.

    A value is out of reach if a part of the prompt before it is not whole; it does no harm. Exit
    code 1 if a damaged value is within reach: whoever reads it computes instead.
    """
    from chunkcache.kv.survey import survey

    with _progress() as progress:
        found = survey(store, progress)
    facts = found.to_dict() | {"leftovers": store.collect(dry=True)}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        from chunkcache.lab.views import store as views
        from chunkcache.lab.views.tables import console

        console().print(views.survey(where, facts))
    if found.damage:
        ctx.exit(1)


@command.command("gc", short_help="Drop what nobody can use.")
@_store_option
@click.option("--dry-run", "dry", is_flag=True, help="Only say what would be dropped.")
@_json_option
def gc(store: Store, where: str, dry: bool, as_json: bool) -> None:
    """Drop what nobody can use: damaged and lost values, and those out of reach.

    Expired values go too if STORE names a ttl, and the oldest if it names a budget.
    """
    from chunkcache.kv.survey import survey, sweep

    with _progress() as progress:
        found = survey(store, progress)
    swept = sweep(store, found, dry).to_dict()
    if as_json:
        click.echo(json.dumps(swept, indent=2))
        return
    from chunkcache.lab.views import store as views
    from chunkcache.lab.views.tables import console

    console().print(views.swept(where, swept, dry))


@command.command("rm", short_help="Remove stored prefixes.")
@_store_option
@click.argument("prefixes", nargs=-1, metavar="[PREFIX]...")
@click.option("--namespace", help="All of one namespace: its first digits.")
@click.option("--model", help="All of a model, as `ls` calls it.")
@click.option("--all", "everything", is_flag=True, help="All there is.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(store: Store, where: str, yes: bool, **chosen: Any) -> None:
    """Remove all that lies behind each PREFIX, which is the first digits of a name that `ls` shows.

    Who runs now keeps what is in memory, and may write it again.
    """
    from chunkcache.kv.inventory import take_inventory
    from chunkcache.lab.views.words import number, size

    if sum(map(bool, chosen.values())) != 1:
        raise click.UsageError("name prefixes, or one of --namespace, --model and --all")
    inventory = take_inventory(store)
    keys = _chosen(inventory, **chosen)
    held = sum(inventory.values[key].bytes for key in keys)
    what = f"{number(len(keys))} values ({size(held)}) from {where}"
    if not yes:
        if not sys.stdin.isatty():
            raise click.ClickException(f"say --yes to remove {what}")
        click.confirm(f"remove {what}?", abort=True, err=True)
    gone = sum(store.delete(keys[at : at + _TOGETHER]) for at in range(0, len(keys), _TOGETHER))
    click.echo(f"removed {number(gone)} of {what}", err=True)


def _chosen(
    inventory: Inventory,
    prefixes: tuple[str, ...],
    namespace: str | None,
    model: str | None,
    everything: bool,
) -> list[Key]:
    from chunkcache.kv import selection

    if everything:
        return list(inventory.values)
    if namespace:
        return selection.space(inventory, namespace)
    if model:
        return selection.model(inventory, model)
    return list(dict.fromkeys(key for one in prefixes for key in selection.family(inventory, one)))


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    values = TextColumn("{task.completed:,} of {task.total:,} values")
    columns = (TextColumn("reading"), BarColumn(), values, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=0)
        yield lambda done, total: bar.update(task, completed=done, total=total)
