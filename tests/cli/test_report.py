"""`chunkcache report` of files; a server's report is in test_serving.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chunkcache.cli.main import main
from click.testing import CliRunner, Result

from chunkcache.lab.traces.recorder import Recorder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two prompts in turns, as a cache of three chunks of 4 tokens recorded them."""
    path = tmp_path / "trace.jsonl"
    with Recorder(path) as recorder:
        recorder.about(model="m", policy="lru", chunk_size=4, capacity_tokens=12)
        for number in range(10):
            reuse = {"cached_tokens": 4 if number > 1 else 0, "reason": "evicted"}
            head = [number % 2] * 8
            recorder.write([*head, 9, number], time=number, reuse=reuse, seconds=0.5)
    return path


def test_json_has_all_there_is(trace: Path) -> None:
    done = run("--trace", trace, "--json", "--price", 2, "--cached-price", 1)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["cache"] == {
        "capacity_tokens": 12, "policy": "lru", "chunk_size": 4, "model": "m",
    }  # fmt: skip
    assert (found["requests"], found["prompt_tokens"], found["cached_tokens"]) == (10, 100, 32)
    assert found["misses"] == {"never seen": 36, "evicted": 32}
    assert found["unlimited_tokens"] == 64 and found["percent_of_unlimited"] == 50.0
    assert found["money"]["saved"] == pytest.approx(32e-6)
    assert found["money"]["spent"] == pytest.approx((68 * 2 + 32) / 1e6)


def test_another_cache_is_simulated(trace: Path) -> None:
    done = run("--trace", trace, "--json", "--capacity", "unlimited")
    found = json.loads(done.stdout)
    assert (found["source"], found["cached_tokens"]) == ("simulated", 64)
    assert found["cache"]["chunk_size"] == 4
    found = json.loads(run("--trace", trace, "--json", "--policy", "lfu").stdout)
    assert found["cache"]["policy"] == "lfu" and found["cache"]["capacity_tokens"] == 12


def test_people_see_what_to_do(trace: Path) -> None:
    text = run("--trace", trace).stdout
    assert "What to do" in text and "<- now" in text and "\x1b" not in text
    markdown = run("--trace", trace, "--markdown").stdout
    assert markdown.startswith("# trace.jsonl\n") and "| reason |" in markdown


def test_pages_and_figures_are_written(trace: Path, tmp_path: Path) -> None:
    page, figure = tmp_path / "a.html", tmp_path / "a.svg"
    done = run("--trace", trace, "--html", page, "--plot", figure)
    assert done.exit_code == 0, done.output
    assert page.read_text().startswith("<!doctype html>") and "<svg" in figure.read_text()
    assert f"{page} is written" in done.stderr
    missing = run("--trace", trace, "--html", tmp_path / "missing" / "a.html")
    assert missing.exit_code == 1 and "cannot be written" in missing.stderr
    assert run("--trace", trace, "--plot", tmp_path / "a.doc").exit_code == 1


def test_a_page_of_a_chat_log_says_what_to_move(tmp_path: Path) -> None:
    log, page = tmp_path / "log.json", tmp_path / "a.html"
    rules = " ".join(f"Rule {n}: be kind to customer {n}." for n in range(40))
    chats = [
        [
            {"role": "system", "content": f"Time: {n:02d}:00\n{rules}"},
            {"role": "user", "content": "Hi"},
        ]
        for n in range(6)
    ]
    log.write_text(json.dumps(chats))
    done = run("--trace", log, "--tokenizer", "demo", "--html", page, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["seconds"] is None  # a log has no times
    text = page.read_text()
    assert "line 1 of the system prompt" in text and text.count("What to do") == 1


@pytest.mark.parametrize(
    "options",
    [["--json", "--markdown"], ["--capacity", "much"], ["--capacity", "2GiB"], ["--price", "-1"]],
)
def test_wrong_usage(trace: Path, options: list[str]) -> None:
    assert run("--trace", trace, *options).exit_code == 2


def test_what_is_no_trace_is_told(tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    path.write_text("nothing\n")
    done = run("--trace", path)
    assert done.exit_code == 1 and "--tokenizer" in done.stderr
    assert run("--trace", tmp_path / "missing").exit_code == 2
    assert run("--trace", path, "--policy", "never").exit_code == 1
