"""`chunkcache warm demo`: what it wrote is found, by itself and by a server, whenever it was killed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chunkcache.cli.main import main
from chunkcache.cli.warming import Warmed, Warmer, eager
from click.testing import CliRunner, Result

import chunkcache
from tests.cli.serving import SHOP, SMALL, ask, cached_tokens, serving
from tests.stores.servers import Server
from tests.zoo import zoo_model

SYSTEM = [{"role": "system", "content": SHOP.system_prompt}]
LONG = "You answer customers of a bicycle shop. Be brief. " * 280  # 7,280 tokens
PIECE = 512


def write(folder: Path, **prompts: object) -> str:
    """A file of prompts by name: texts, or messages."""
    path = folder / "prompts.toml"
    blocks = [
        f"[[prompt]]\nname = {json.dumps(name)}\n"
        + (
            f"text = {json.dumps(prompt)}"
            if isinstance(prompt, str)
            else f"messages = {_toml(prompt)}"
        )
        for name, prompt in prompts.items()
    ]
    path.write_text("\n\n".join(blocks), encoding="utf-8")
    return str(path)


def _toml(messages: object) -> str:
    assert isinstance(messages, list)
    pairs = [
        ", ".join(f"{key} = {json.dumps(value)}" for key, value in m.items()) for m in messages
    ]
    return "[" + ", ".join(f"{{{pair}}}" for pair in pairs) + "]"


def warm(prompts: str, *options: str) -> Result:
    command = ["warm", "demo", "--prompts", prompts, *SMALL, *options]
    return CliRunner().invoke(main, command)


def summary(result: Result) -> list[dict]:
    found: list[dict] = json.loads(result.stdout)
    return found


def test_what_was_warmed_is_found(tmp_path: Path) -> None:
    """By a second run, which computes nothing, and by a server's first request."""
    store = ("--store", f"disk:{tmp_path}/store")
    prompts = write(tmp_path, bot=SYSTEM, text=SHOP.system_prompt * 2)
    result = warm(prompts, *store, "--json")
    assert result.exit_code == 0, result.output
    assert f"prefixes are kept in disk:{tmp_path}/store, at most 10.0 GiB\n" in result.stderr
    for one in summary(result):
        assert one["computed"] == one["stored"] > one["tokens"] - 32
        assert one["values_written"] >= one["stored"] // 32
        assert one["error"] is None
    for one in summary(warm(prompts, *store, "--json")):
        assert (one["found"], one["computed"]) == (one["stored"], 0)
        assert one["stored"] > one["tokens"] - 32
    with serving("--store", f"disk:{tmp_path}/store?load=always") as (url, _):
        assert cached_tokens(ask(url, 0)) > 150


def test_the_users_cache_is_the_store_of_both(tmp_path: Path, caches: Path) -> None:
    result = warm(write(tmp_path, bot=SYSTEM))
    assert result.exit_code == 0, result.output
    assert f"prefixes are kept in disk:{caches}/chunkcache, " in result.stderr
    with serving("--store", f"disk:{caches}/chunkcache?load=always") as (url, _):
        assert cached_tokens(ask(url, 0)) > 150


def test_tenants_share_nothing(tmp_path: Path) -> None:
    store = ("--store", f"disk:{tmp_path}/store", "--json")
    prompts = write(tmp_path, bot=SYSTEM)
    for options in ([], ["--tenant", "a"]):
        (one,) = summary(warm(prompts, *store, *options))
        assert one["found"] == 0
    (one,) = summary(warm(prompts, *store, "--tenant", "a"))
    assert one["computed"] == 0


@pytest.mark.parametrize("name", ["gemma3_text", "granitemoehybrid", "bloom", "mamba2"])
def test_models_of_every_tier(name: str, tmp_path: Path) -> None:
    """In pieces; a last one shorter than a chunk adds nothing."""
    random_ = random.Random(name)
    ids = [random_.randrange(3, 96) for _ in range(197)]
    model, store = zoo_model(name), eager(f"disk:{tmp_path}/store?hits=3")
    config = chunkcache.Config(chunk_size=16, border=32, stores=[store])
    computed = []
    for _ in range(2):
        prompt, done = Warmed(name, ids), []
        with chunkcache.wrap(model, config=config) as cached:
            Warmer(cached, piece=70).warm(prompt, done.append)
        assert prompt.error is None
        assert prompt.stored == 192
        assert done == [64, 128, 192, 197]
        computed.append(prompt.computed)
    assert computed == [192, 0]
    with chunkcache.wrap(model, config=config) as cached:
        cached.generate(torch.tensor([ids]), max_new_tokens=1)
        assert cached.last_reuse[0].cached_tokens == 192


def test_a_store_smaller_than_the_prompts(tmp_path: Path) -> None:
    store = f"disk:{tmp_path}/store?budget=100KiB"
    result = warm(write(tmp_path, bot=SYSTEM), "--store", store)
    assert result.exit_code == 0, result.output
    assert f"disk:{tmp_path}/store holds 100.0 KiB: what came first leaves first" in result.stderr


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    command = ["warm", "demo", "--prompts", write(tmp_path, **{"[bot]": SYSTEM}), *SMALL]
    result = CliRunner(env={"TTY_COMPATIBLE": "1"}).invoke(
        main, [*command, "--store", f"disk:{tmp_path}/store"]
    )
    assert result.exit_code == 0, result.output
    assert "━" in result.stderr
    assert "[bot]" in result.stderr
    assert "[bot]" in result.stdout


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """It is killed after some pieces were written, and before all were."""
    prompts = write(tmp_path, long=LONG)
    options = ["--store", f"disk:{tmp_path}/store", "--piece", str(PIECE)]
    command = [sys.executable, "-m", "chunkcache", "warm", "demo", "--prompts", prompts, *SMALL]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        lines = iter(process.stderr)
        pieces = (line for line in lines if line.startswith("long: "))
        done = [next(pieces) for _ in range(2)]
        process.kill()
    assert done[1].startswith(f"long: {2 * PIECE:,} of ")
    (one,) = summary(warm(prompts, *options, "--json"))
    assert one["found"] >= 2 * PIECE
    assert one["computed"] > 0
    assert one["error"] is None
    (again,) = summary(warm(prompts, *options, "--json"))
    assert (again["found"], again["computed"]) == (one["stored"], 0)


def test_bad_prompts_do_not_stop_the_others(tmp_path: Path) -> None:
    prompts = write(tmp_path, short="Hello", endless=LONG * 3, bot=SYSTEM)
    result = warm(prompts, "--store", f"disk:{tmp_path}/store")
    assert result.exit_code == 1
    assert "Error: short is not stored: " in result.stderr
    assert "Error: endless is not stored: " in result.stderr
    assert "at most 8192 can be stored" in result.stderr
    assert "bot is not stored" not in result.stderr
    assert "nothing could be written" not in result.stderr
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("bot ")]
    assert row.split()[2] == row.split()[4] != "0"


def test_a_prompt_beyond_the_budget(tmp_path: Path) -> None:
    prompts = write(tmp_path, long=LONG, bot=SYSTEM)
    options = ("--store", f"disk:{tmp_path}/store", "--device-bytes", "2MiB", "--json")
    result = warm(prompts, *options)
    assert result.exit_code == 1
    long, bot = summary(result)
    assert "raise device_bytes" in long["error"]
    assert bot["error"] is None and bot["stored"] > 0


def test_a_store_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    result = warm(write(tmp_path, bot=SYSTEM), "--store", f"disk:{tmp_path}/file/store")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path}/file/store cannot be used: ")
    assert not result.stdout


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "redis")
    yield server
    server.kill()


def test_a_store_that_does_not_answer(tmp_path: Path, server: Server) -> None:
    server.kill()
    url = server.url.replace("//", "//me:secret@")
    result = warm(write(tmp_path, bot=SYSTEM), "--store", url, "--json")
    assert result.exit_code == 1
    assert f"prefixes are kept in {server.url}\n" in result.stderr
    assert "secret" not in result.output
    assert "Error: nothing could be written" in result.stderr
    (one,) = summary(result)
    assert (one["stored"], one["values_written"]) == (0, 0)
    assert one["error"]


def test_a_store_that_takes_no_more(tmp_path: Path, server: Server) -> None:
    """What it took before it was full is said."""
    server.client().config_set("maxmemory", server.client().info("memory")["used_memory"] + 2**23)
    server.client().config_set("maxmemory-policy", "noeviction")
    prompts = write(tmp_path, long=LONG)
    result = warm(prompts, "--store", server.url, "--piece", str(PIECE), "--json")
    assert result.exit_code == 1
    (one,) = summary(result)
    assert 0 < one["stored"] < one["tokens"] - 32
    assert f"long is not stored beyond {one['stored']:,} tokens: " in result.stderr
