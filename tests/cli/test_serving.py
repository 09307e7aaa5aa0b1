"""`chunkcache serve demo` as a process, with `report` and `tree` reading from it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from chunkcache.cli.main import main
from click.testing import CliRunner

from chunkcache.lab.traces.trace import Trace
from tests.cli.serving import KEY, SHOP, ask, cached_tokens, serving
from tests.stores.servers import Server, wait_for


def run(command: str, url: str, *more: str) -> str:
    result = CliRunner().invoke(main, [command, "--url", url, "--api-key", KEY, *more])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_served_preload_is_reused_and_reported(tmp_path: Path) -> None:
    """With no store, which leaves nothing behind; a trace of hashes has what was asked."""
    prompts, caches = tmp_path / "prompts.toml", tmp_path / "caches"
    messages = f'[{{role = "system", content = {json.dumps(SHOP.system_prompt)}}}]'
    prompts.write_text(f'[[prompt]]\nname = "support-bot"\nmessages = {messages}\n')
    trace = tmp_path / "trace.jsonl"
    recording = ("--trace", str(trace), "--trace-hashes")
    options = ("--preload", str(prompts), "--no-store", *recording)
    with serving(*options, caches=caches) as (url, process):
        assert_reported(url)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert [(one.prompt, len(one.keys) > 5 * 8) for one in Trace(trace)] == [
        ("support-bot", True)
    ] * 2
    assert SHOP.questions[0].question not in trace.read_text()
    assert CliRunner().invoke(main, ["simulate", str(trace)]).exit_code == 0
    assert not caches.exists()
    assert "prefixes are" not in (tmp_path / "log").read_text()


def assert_reported(url: str) -> None:
    """Answers to two questions behind a named prompt, and what the reading commands say of them."""
    answers = [ask(url, number) for number in range(2)]
    cached = [cached_tokens(answer) for answer in answers]
    assert 150 < cached[0] <= cached[1]
    stats = json.loads(run("report", url, "--json"))
    assert stats["named"]["support-bot"] == {"requests": 2, "cached_tokens": sum(cached)}
    assert stats["stores"] == {}
    assert stats["hit_rate"] == stats["cached_tokens"] / stats["prompt_tokens"]
    report = stats["report"]
    assert (report["source"], report["requests"]) == ("recorded", 2)
    assert report["cached_tokens"] == stats["cached_tokens"] and stats["saved_seconds"] > 0
    assert report["prompts"]["support-bot"]["requests"] == 2
    assert report["whole_tokens"] > report["unlimited_tokens"]  # it was preloaded
    text = run("report", url)
    assert "support-bot" in text and "Other sizes, by the last 2 prompts" in text
    assert "knew prefixes before" in run("report", url, "--markdown")
    assert "\x1b" not in text  # no tty, no colours
    (row, *_) = json.loads(run("tree", url, "--json"))
    assert row["names"] == ["support-bot"]
    assert row["pinned"]
    assert "support-bot" in run("tree", url)
    refused = CliRunner().invoke(main, ["report", "--url", url, "--api-key", "wrong"])
    assert refused.exit_code == 1
    assert "401" in refused.stderr


def test_a_server_with_a_store_is_warm_after_a_restart(tmp_path: Path) -> None:
    """Stopped right after its answer: what was to be written is written."""
    store = ("--store", f"disk:{tmp_path}/store?load=always")
    with serving(*store) as (url, process):
        first = ask(url, 0)
        process.send_signal(signal.SIGINT)
        process.wait(30)
    with serving(*store) as (url, _):
        second = ask(url, 0)
        assert cached_tokens(second) > 150
        assert second["choices"][0]["message"] == first["choices"][0]["message"]
        stats = json.loads(run("report", url, "--json"))
        assert stats["stores"]["loaded"] * 32 == cached_tokens(second)
        assert stats["stores"]["disk"]["failures"] == 0
        assert "Colder tiers" in run("report", url)


def test_without_a_store_the_users_cache_keeps_prefixes(tmp_path: Path) -> None:
    caches = tmp_path / "caches"
    with serving(caches=caches) as (url, process):
        first = ask(url, 0)
        process.terminate()
        process.wait(30)
    folder = caches / "chunkcache"
    values = [path for path in (folder / "values").rglob("*") if path.is_file()]
    assert values
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in values)
    said = (tmp_path / "log").read_text()
    assert said.count(f"prefixes are kept in disk:{folder}, at most 10.0 GiB\n") == 1
    with serving("--store", f"disk:{folder}?load=always") as (url, _):
        second = ask(url, 0)
        assert cached_tokens(second) > 150
        assert second["choices"][0]["message"] == first["choices"][0]["message"]


def test_a_cache_that_cannot_be_used_is_done_without(tmp_path: Path) -> None:
    """Unlike a store that somebody asked for."""
    caches = tmp_path / "caches"
    caches.write_text("no folder")
    with serving(caches=caches) as (url, _):
        assert ask(url, 0)["choices"][0]["message"]["content"]
    said = (tmp_path / "log").read_text()
    assert (
        said.count(f"Warning: prefixes are not kept on disk: {caches}/chunkcache cannot be used")
        == 1
    )
    result = CliRunner().invoke(main, ["serve", "demo", "--store", f"disk:{caches}/store"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {caches}/store cannot be used")


def test_two_servers_share_a_redis_and_tenants_do_not(tmp_path: Path) -> None:
    """The first request to the second server finds what the first one computed."""
    redis = Server(tmp_path / "redis")
    store = ("--store", f"{redis.url}?load=always")
    try:
        with (
            serving(*store) as (one, _),
            serving(*store) as (two, _),
            serving(*store, "--tenant", "other") as (other, _),
        ):
            first = ask(one, 0)

            def written() -> bool:
                found = json.loads(run("report", one, "--json"))
                return found["stores"]["saved"] >= found["chunks"] > 5

            wait_for(written, "the first server's chunks in Redis")
            second, third = ask(two, 0), ask(other, 0)
            cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in (second, third)]
            assert cached[0] > 150 and cached[1] == 0
            assert second["chunkcache"]["tiers"] == {"redis": cached[0]}
            answers = [answer["choices"][0]["message"] for answer in (first, second, third)]
            assert answers[0] == answers[1] == answers[2]
    finally:
        redis.kill()
