"""`chunkcache store` over folders and real servers."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chunkcache.cli.main import main
from click.testing import CliRunner, Result

import chunkcache
from chunkcache.kv.notes import model_key
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.redis import RedisStore
from tests.models import tiny
from tests.stores.filling import LARGE, ONE, OTHER, about, flipped, path_of, prefix

COMMANDS = ("ls", "stat", "verify", "gc", "rm")
GROUP = path_of([1] * 4)[0].key.group


def run(*arguments: str, store: str) -> Result:
    return CliRunner().invoke(main, ["store", *arguments, "--store", store])


def read(*arguments: str, store: str) -> Any:
    done = run(*arguments, "--json", store=store)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(params=["disk", "redis"])
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store with two prefixes of one model, and one of another."""
    store: DiskStore | RedisStore
    if request.param == "disk":
        found = f"disk:{tmp_path}/kv"
        store = DiskStore(tmp_path / "kv", 2**40)
    else:
        found = request.getfixturevalue("server").url
        store = RedisStore.open(found)
        store.client.flushall()
    store.put([about(ONE), *prefix([1] * 16, name="support-bot", state=True)])
    store.put(prefix([1] * 4 + [2] * 400, name="[bold]other"))
    store.put([about(OTHER, model="gpt2"), *prefix([9] * 20, OTHER, layout=LARGE)])
    store.close()
    return found


def opened(name: str) -> DiskStore | RedisStore:
    kind, _, folder = name.partition(":")
    return DiskStore(folder, 2**40) if kind == "disk" else RedisStore.open(name)


def damage(name: str, number: int, delete: bool = False) -> None:
    """Of the first prefix, one chunk."""
    store = opened(name)
    key, value = prefix([1] * 16)[number]
    if delete:
        store.delete([key])
    else:
        store.put([(key, flipped(value, 8 * len(value) - 1))])
    store.close()


def test_ls(name: str) -> None:
    rows = {row["group"]: row for row in read("ls", store=name)}
    assert len(rows) == 2
    assert rows[GROUP]["model"] == "llama" and rows[GROUP]["namespace"] == ONE.hex()
    assert (rows[GROUP]["chunks"], rows[GROUP]["tokens"]) == (104, 416)
    names = [{"name": "[bold]other", "tokens": 404}, {"name": "support-bot", "tokens": 16}]
    assert rows[GROUP]["prompts"] == names
    text = run("ls", store=name).stdout
    assert GROUP[:12] in text and "[bold]other (404)" in text and "gpt2" in text
    assert max(map(len, text.splitlines())) <= 120


def test_stat(name: str) -> None:
    found = read("stat", store=name)
    assert (found["values"], found["chunks"], found["snapshots"], found["notes"]) == (
        114,
        109,
        1,
        4,
    )
    assert (found["families"], found["tokens"], found["budget"]) == (2, 436, None)
    assert {space["model"]: space["token_bytes"] for space in found["namespaces"]} == {
        "llama": 48,
        "gpt2": 48,
    }
    text = run("stat", store=name).stdout
    assert "llama" in text and "on the device" in text
    if name.startswith("redis"):
        assert found["server"]["policy"] == "noeviction"
        assert "when that is full     noeviction" in text
    else:
        assert found["oldest_use"] <= found["newest_use"] and "server" not in found
        assert read("stat", store=f"{name}?budget=1GiB")["budget"] == 2**30
        assert "of 1.0 GiB" in run("stat", store=f"{name}?budget=1GiB").stdout


def test_verify_and_gc(name: str) -> None:
    found = read("verify", store=name)
    assert found["states"]["whole"]["values"] == found["values"] == 114
    assert found["longest_path"] == 404
    assert "404 tokens" in run("verify", store=name).stdout

    damage(name, 2)
    done = run("verify", "--json", store=name)
    assert done.exit_code == 1 and not done.stderr
    found = json.loads(done.stdout)
    assert found["reachable_corrupt"] == 1
    assert found["states"]["unreachable"]["values"] == 3  # a chunk, a snapshot, a note
    shown = run("verify", store=name)
    assert shown.exit_code == 1 and "1 within reach" in shown.stdout

    dry = read("gc", "--dry-run", store=name)
    assert (dry["corrupt"], dry["unreachable"], dry["notes"]) == (1, 3, 0)
    assert read("stat", store=name)["values"] == 114
    assert "Would be dropped" in run("gc", "--dry-run", store=name).stdout
    assert read("gc", store=name) == dry
    assert read("stat", store=name)["values"] == 110
    assert not any(read("gc", store=name).values())
    assert run("verify", store=name).exit_code == 0


def test_out_of_reach_is_no_damage(name: str) -> None:
    damage(name, 2)
    damage(name, 0, delete=True)
    found = read("verify", store=name)
    assert found["reachable_corrupt"] == 0 and found["states"]["corrupt"]["values"] == 1
    assert read("gc", store=name)["notes"] == 1
    assert [row["model"] for row in read("ls", store=name)] == ["gpt2"]


def test_gc_keeps_to_no_budget_that_is_not_named(tmp_path: Path) -> None:
    """The usual one of a folder would make values leave that others may keep."""
    store = DiskStore(tmp_path / "kv", 2**40)
    store.put(prefix(range(40)))
    store.close()
    name = f"disk:{tmp_path}/kv"
    held = read("stat", store=name)["bytes"]
    assert not any(read("gc", store=name).values())
    assert read("stat", store=name)["values"] == 10
    read("gc", store=f"{name}?budget={held // 2}")
    assert 0 < read("stat", store=name)["values"] <= 5
    assert run("verify", store=name).exit_code == 0  # ends of paths leave first


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ([GROUP[:12]], ["gpt2"]),
        ([GROUP[:12], path_of([9] * 4, OTHER)[0].key.group[:10]], []),
        (["--namespace", OTHER.hex()[:8]], ["llama"]),
        (["--model", "llama"], ["gpt2"]),
        (["--all"], []),
    ],
)
def test_rm(name: str, arguments: list[str], left: list[str]) -> None:
    refused = run("rm", *arguments, store=name)
    assert refused.exit_code == 1 and refused.stderr.startswith("Error: say --yes to remove ")
    assert len(read("ls", store=name)) == 2
    done = run("rm", *arguments, "--yes", store=name)
    assert done.exit_code == 0 and done.stderr.startswith("removed "), done.output
    assert [row["model"] for row in read("ls", store=name)] == left
    if "--all" in arguments:
        assert read("stat", store=name)["values"] == 0
        assert run("ls", store=name).stdout.startswith("Nothing is stored in ")
    if "--model" in arguments:
        store = opened(name)
        assert store.exists([model_key(ONE), model_key(OTHER)]) == [False, True]
        store.close()


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        ([], 2, "name prefixes, or one of"),
        (["aa", "--all"], 2, "name prefixes, or one of"),
        (["0123456789", "--yes"], 1, "no prefix in the store begins with"),
        (["--namespace", "00", "--yes"], 1, "no namespace in the store begins with"),
        (["--model", "bert", "--yes"], 1, "no note in the store names a model 'bert'"),
    ],
)
def test_rm_refuses(name: str, arguments: list[str], code: int, why: str) -> None:
    done = run("rm", *arguments, store=name)
    assert done.exit_code == code and why in done.stderr
    assert read("stat", store=name)["values"] == 114


@pytest.mark.parametrize(("answer", "left"), [("n", 10), ("y", 0)])
def test_rm_asks_on_a_terminal(tmp_path: Path, answer: str, left: int) -> None:
    store = DiskStore(tmp_path / "kv", 2**40)
    store.put(prefix(range(40)))
    store.close()
    name = f"disk:{tmp_path}/kv"
    done = on_terminal(f"{answer}\n", "rm", "--all", "--store", name)
    assert done.returncode == (0 if answer == "y" else 1), done.stderr
    assert b"remove 10 values (" in done.stderr
    assert read("stat", store=name)["values"] == left


def on_terminal(keys: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a command that reads from a terminal on which somebody types."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, keys.encode())
        command = [sys.executable, "-m", "chunkcache", "store", *arguments]
        return subprocess.run(command, stdin=theirs, capture_output=True, check=False)
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_bar_is_shown_on_a_terminal_only(name: str) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "chunkcache", "store", "verify", "--store", name]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # nobody writes to it any more
        pass
    os.close(ours)
    assert done.returncode == 0 and b"114 of 114 values" in shown
    assert b"reading" not in done.stdout and not run("verify", store=name).stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_there_is_1_and_one_line(command: str, tmp_path: Path) -> None:
    more = ["--all"] if command == "rm" else []
    (tmp_path / "mine").mkdir()
    for store, why in {
        f"disk:{tmp_path}/none?ttl=1h": "there is no store in",
        f"disk:{tmp_path}/mine": "there is no store in",
        "redis://127.0.0.1:9": "Redis cannot be used",
        "memory:1GiB": "is part of its process",
        "tape:x": "is no store",
        "disk:": "names no folder",
    }.items():
        done = run(command, *more, store=store)
        assert done.exit_code == 1 and why in done.stderr, done.output
        assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_the_default_is_the_folder_that_serve_uses(caches: Path, tmp_path: Path) -> None:
    place = tmp_path / "chunkcache"
    store = DiskStore(place, 2**40)
    store.put(prefix(range(40)))
    store.close()
    runner = CliRunner(env={"XDG_CACHE_HOME": str(tmp_path)})
    done = runner.invoke(main, ["store", "stat", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["values"] == 10
    runner = CliRunner(env={"CHUNKCACHE_STORE": f"disk:{tmp_path}/other"})
    assert "there is no store in" in runner.invoke(main, ["store", "stat"]).stderr


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from chunkcache.cli.main import main\n"
        f"main({['store', *arguments]!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'rich', 'starlette'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_what_a_model_leaves_behind(tmp_path: Path) -> None:
    name = f"disk:{tmp_path}/kv"
    settings = chunkcache.Config(chunk_size=16, stores=[name])
    with chunkcache.wrap(tiny("llama"), config=settings) as cached:
        cached.preload(list(range(3, 83)), name="support-bot")
    (row,) = read("ls", store=name)
    assert (row["chunks"], row["tokens"], row["chunk_size"]) == (5, 80, 16)
    assert row["prompts"] == [{"name": "support-bot", "tokens": 80}]
    (space,) = read("stat", store=name)["namespaces"]
    assert space["token_bytes"] <= space["stored_token_bytes"]
    assert read("verify", store=name)["longest_path"] == 80
