"""`chunkcache serve demo` as a process, with `report` and `tree` reading from it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from chunkcache.cli.main import main
from click.testing import CliRunner

from chunkcache.demo.facts import HELD_OUT_SEED, make_shop

KEY = "sesame"
SHOP = make_shop(HELD_OUT_SEED, fact_tokens=200)


@contextmanager
def serving(*options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "chunkcache", "serve", "demo", "--port", str(port)]
    small = ["--chunk-size", "32", "--device-bytes", "32MiB"]
    environment = os.environ | {"CHUNKCACHE_API_KEY": KEY}
    with subprocess.Popen([*command, *small, *options], env=environment) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(url, process)
            yield url, process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen]]:
    prompts = tmp_path_factory.mktemp("serve") / "prompts.toml"
    messages = f'[{{role = "system", content = {json.dumps(SHOP.system_prompt)}}}]'
    prompts.write_text(f'[[prompt]]\nname = "support-bot"\nmessages = {messages}\n')
    with serving("--preload", str(prompts)) as found:
        yield found


def _wait(url: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        try:
            httpx2.get(f"{url}/health")
            return
        except httpx2.ConnectError:
            time.sleep(0.2)
    pytest.fail("the server did not come up")


def run(command: str, url: str, *more: str) -> str:
    result = CliRunner().invoke(main, [command, "--url", url, "--api-key", KEY, *more])
    assert result.exit_code == 0, result.output
    return result.stdout


def ask(url: str, number: int) -> dict:
    messages = [
        {"role": "system", "content": SHOP.system_prompt},
        {"role": "user", "content": SHOP.questions[number].question},
    ]
    body = {"model": "demo", "messages": messages, "max_tokens": 24}
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx2.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60).json()


def test_a_served_preload_is_reused_and_reported(server: tuple[str, subprocess.Popen]) -> None:
    url, process = server
    answers = [ask(url, number) for number in range(2)]
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
    assert 150 < cached[0] <= cached[1]
    stats = json.loads(run("report", url, "--json"))
    assert stats["named"]["support-bot"] == {"requests": 2, "cached_tokens": sum(cached)}
    assert stats["hit_rate"] == stats["cached_tokens"] / stats["prompt_tokens"]
    text = run("report", url)
    assert "support-bot" in text
    assert "\x1b" not in text  # no tty, no colours
    (row, *_) = json.loads(run("tree", url, "--json"))
    assert row["names"] == ["support-bot"]
    assert row["pinned"]
    assert "support-bot" in run("tree", url)
    refused = CliRunner().invoke(main, ["report", "--url", url, "--api-key", "wrong"])
    assert refused.exit_code == 1
    assert "401" in refused.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_server_with_a_store_is_warm_after_a_restart(end: signal.Signals, tmp_path: Path) -> None:
    """Stopped right after its answer: what was to be written is written."""
    store = ("--store", f"disk:{tmp_path}/store")
    with serving(*store) as (url, process):
        first = ask(url, 0)
        process.send_signal(end)
        process.wait(30)
    with serving(*store) as (url, _):
        second = ask(url, 0)
        details = second["usage"]["prompt_tokens_details"]
        assert details["cached_tokens"] > 150
        assert second["choices"][0]["message"] == first["choices"][0]["message"]
        stats = json.loads(run("report", url, "--json"))
        assert stats["stores"]["loaded"] * 32 == details["cached_tokens"]
        assert stats["stores"]["disk"]["failures"] == 0
        assert "loaded from colder tiers" in run("report", url)
