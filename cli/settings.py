"""The options that decide what is stored under which name, so that `serve` finds what `warm` wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from .loading import dtype_option

if TYPE_CHECKING:
    from chunkcache import CachedModel, Config

_BORDER = 512  # tokens
_OPTIONS = (
    click.option(
        "--device-bytes", default="2GiB", show_default=True, help="Budget of stored KV, as 512MiB."
    ),
    click.option("--chunk-size", type=click.IntRange(1, 1024), default=64, show_default=True),
    click.option(
        "--mode",
        type=click.Choice(["exact", "fast"]),
        default="exact",
        show_default=True,
        help="exact: the cache never changes an answer, bit for bit.",
    ),
    dtype_option,
    click.option("--tenant", default="", help="Share prompts only inside this tenant."),
    click.option(
        "--store",
        "stores",
        multiple=True,
        help="A colder tier: disk:DIR or redis://HOST; repeatable, the fastest first. By default a "
        "folder in the user's cache.",
    ),
)


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --device-bytes, --chunk-size, --mode, --dtype, --tenant and --store."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def make_settings(options: dict[str, Any], stores: Sequence[str]) -> Config:
    """The settings that the options ask for.

    Raises:
        ConfigError: they cannot work.
    """
    from chunkcache import Config

    chunk: int = options["chunk_size"]
    return Config(
        mode=options["mode"],
        chunk_size=chunk,
        device_bytes=options["device_bytes"],
        border=-(-_BORDER // chunk) * chunk,
        tenant=options["tenant"],
        stores=stores,
    )


def default_store() -> str:
    """The store in the user's cache."""
    from chunkcache.stores.places import cache_folder

    return f"disk:{cache_folder()}"


def announce(cached: CachedModel) -> None:
    """Two lines on stderr for each store: where prefixes are kept, and whether reading pays."""
    from chunkcache.lab.views.stats import break_even
    from chunkcache.lab.views.words import size
    from chunkcache.stores.places import budget, shown

    stats = cached.stats()
    tiers = [tier for tier in stats.stores.values() if isinstance(tier, Mapping)]
    for number, name in enumerate(cached.settings.stores):
        most = budget(name)
        limit = "" if most is None else f", at most {size(most)}"
        click.echo(f"prefixes are kept in {shown(name)}{limit}", err=True)
        if number < len(tiers):
            click.echo(f"  {break_even(tiers[number], stats.chunk_size)}", err=True)


def warn_of_budgets(stores: Sequence[str], needed: int) -> None:
    """A line on stderr for each store that cannot hold so many bytes."""
    from chunkcache.lab.views.words import size
    from chunkcache.stores.places import budget, shown

    for name in stores:
        most = budget(name)
        if most is not None and needed > most:
            click.echo(
                f"Warning: these prompts take up to {size(needed)}, and {shown(name)} holds "
                f"{size(most)}: what came first leaves first",
                err=True,
            )
