"""`chunkcache demo`."""

from __future__ import annotations

import json

import click

from .loading import load


@click.command(short_help="See what a prefix cache does.")
@click.option(
    "--users", type=click.IntRange(1, 100), default=24, show_default=True, help="How many ask."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the story.")
def command(users: int, as_json: bool) -> None:
    """See what a prefix cache does: a support bot and its users on the built-in model.

    Needs no network. Takes well under a minute on a laptop.
    """
    model, tokenizer = load("demo")
    from chunkcache.lab.demo_story import run_story

    def progress(what: str) -> None:
        click.echo(f"... {what}", err=True)

    story = run_story(model, tokenizer, users, progress=progress)
    if as_json:
        click.echo(json.dumps(story.to_dict(), indent=2))
        return
    from chunkcache.lab.views.demo import tell
    from chunkcache.lab.views.tables import console

    tell(story, console())
