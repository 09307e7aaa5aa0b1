"""Writes docs/cli.md from the help of every command.

    python docs/generate_cli.py [--check]

With --check nothing is written; the exit code is 1 if the page is not current.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from chunkcache.cli.main import main as program

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Command line

Generated from `--help` by `make docs`; do not edit.
"""


def commands(command: click.Command, context: click.Context) -> Iterator[click.Context]:
    """The contexts of a command and of all below it."""
    yield context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None, name
            yield from commands(inner, _context(inner, name, context))


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    return click.Context(
        command, parent, name, terminal_width=90, max_content_width=90, **_settings(command)
    )


def _settings(command: click.Command) -> dict[str, object]:
    widths = {"terminal_width", "max_content_width"}
    return {key: value for key, value in command.context_settings.items() if key not in widths}


def render() -> str:
    """The page."""
    parts = [HEAD]
    for context in commands(program, _context(program, "chunkcache", None)):
        parts.append(f"## {context.command_path}\n\n```text\n{context.get_help()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    page = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit("docs/cli.md is not current: run `make docs`")
