"""`chunkcache report`."""

from __future__ import annotations

import json

import click

from .client import fetch, server_options


@click.command(short_help="Show a server's hit rate and memory.")
@server_options
def command(url: str, api_key: str | None, as_json: bool) -> None:
    """Show a server's hit rate, why tokens were computed, and its memory."""
    stats = fetch(url, "/stats", api_key)
    if as_json:
        click.echo(json.dumps(stats, indent=2))
        return
    from chunkcache.lab.render import console, report

    console().print(report(stats))
