"""`chunkcache`: the group of all commands.

Commands import what they need when they run: `chunkcache --help` and completion load no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from chunkcache import __version__
from chunkcache.errors import ChunkcacheError

_COMMANDS = (
    "serve", "warm", "demo", "report", "explain", "simulate", "lint-template", "tree", "verify", "plan",
    "store",
)  # fmt: skip


class LazyGroup(click.Group):
    """Finds command NAME in the module beside this one; library errors end with exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a reader's interest."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in _COMMANDS:
            return None
        module = f".{cmd_name.replace('-', '_')}"
        command: click.Command = importlib.import_module(module, __package__).command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Runs; an error of the library becomes one line on stderr."""
        try:
            return super().invoke(ctx)
        except ChunkcacheError as error:
            raise click.ClickException(str(error)) from error


@click.command(
    cls=LazyGroup, context_settings={"auto_envvar_prefix": "CHUNKCACHE", "max_content_width": 100}
)
@click.version_option(__version__, prog_name="chunkcache")
def main() -> None:
    """A KV prefix cache for Hugging Face models: exact reuse of every prompt beginning seen before.

    MODEL is a local folder, a hub name, or `demo` for the built-in model. Options can be set by
    environment variables such as CHUNKCACHE_SERVE_PORT.

    Exit codes: 0 done, 1 failed, 2 wrong usage.
    """
