"""Runs the commands on a page and writes what they print below them.

    python -m docs.generate_examples [--check]

Python on the page runs first, in the same folder. With --check nothing is written; the exit code is 1 if
a page is not current.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from chunkcache.cli.main import main as program
from click.testing import CliRunner

PAGES = (Path(__file__).with_name("reports.md"),)
_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_WIDTH = "110"


def render(text: str) -> str:
    """A page with the output of its commands as it is now, made in an empty folder."""
    names: dict[str, object] = {"__name__": "document"}

    def run(block: re.Match[str]) -> str:
        if block[1] == "python":
            exec(compile(block[2], "document", "exec"), names)
            return block[0]
        commands = [line[2:] for line in block[2].splitlines() if line.startswith("$ ")]
        return "```console\n" + "".join(map(_output, commands)) + "```"

    with _empty_folder():
        return _BLOCK.sub(run, text)


def _output(command: str) -> str:
    name, *arguments = shlex.split(command)
    assert name == "chunkcache", command
    done = CliRunner().invoke(program, arguments, env={"COLUMNS": _WIDTH})
    assert done.exit_code == 0, done.output
    lines = (line.rstrip() for line in done.stdout.splitlines())
    return "\n".join([f"$ {command}", *lines]) + "\n"


@contextmanager
def _empty_folder() -> Iterator[None]:
    before = os.getcwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def stale() -> list[Path]:
    """Pages that say something else than the commands do now; these are written, unless with --check."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        current = render(text)
        if current != text:
            found.append(page)
            if "--check" not in sys.argv[1:]:
                page.write_text(current, encoding="utf-8")
    return found


if __name__ == "__main__":
    pages = stale()
    if pages and "--check" in sys.argv[1:]:
        sys.exit(f"not current: {', '.join(page.name for page in pages)}; run `make docs`")
