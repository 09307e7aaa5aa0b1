"""The documents say what is true: code runs, links lead somewhere, lists are complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a document, in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / name).read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "document"}
    found = list(CODE.finditer(text))
    assert found
    for block in found:
        lines = text.count("\n", 0, block.start(1))
        code = compile("\n" * lines + block[1], str(ROOT / name), "exec")
        exec(code, names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target, part in LINK.findall(document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        found = document.parent / target if target else document
        assert found.exists(), target
        assert not part or part in _headings(found), f"{target}#{part}"


def _headings(document: Path) -> set[str]:
    """The anchors that renderers make of headings."""
    lines = document.read_text(encoding="utf-8").splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def test_command_line_reference_is_current() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate_cli.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_examples_are_current() -> None:
    """Commands on a page print what stands below them."""
    command = [sys.executable, "-m", "docs.generate_examples", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_architecture_lists_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = _listed(text.split("```text\n", 1)[1].split("```", 1)[0])
    files = [*(ROOT / "chunkcache").rglob("*.py"), *(ROOT / "cli").glob("*.py")]
    present = {str(file.relative_to(ROOT)) for file in files}
    assert {name for name in listed if name.endswith(".py")} == present
    assert len(listed) == len(set(listed))


def _listed(tree: str) -> list[str]:
    """The paths in a tree indented by two spaces, with a phrase behind each name."""
    path: list[str] = []
    found = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path[depth:] = [line.split()[0].rstrip("/")]
        found.append("/".join(path))
    return found


def test_settings_are_described() -> None:
    from dataclasses import fields

    from chunkcache import Config

    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for field in fields(Config):
        assert f"| `{field.name}` | {_shown(field.default)} |" in text, field.name


def _shown(value: object) -> str:
    if value in (2 * 2**30, 16 * 2**20):
        return '"2GiB"' if value == 2 * 2**30 else '"16MiB"'
    return f'"{value}"' if isinstance(value, str) else str(value)
