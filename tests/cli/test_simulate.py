"""`chunkcache simulate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chunkcache.cli.main import main
from click.testing import CliRunner, Result

from chunkcache.lab.recorder import Recorder
from tests.lab.traces import data


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["simulate", *map(str, arguments)])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two prompts in turns that do not fit beside a third."""
    path = tmp_path / "trace.jsonl"
    prompts = [[1, 2, 3], [1, 2, 4], [9, 8, 7, 6]] * 8
    lines = (
        {"input_length": 512 * len(ids) - 12, "output_length": 1, "hash_ids": ids}
        for ids in prompts
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_json_has_what_scripts_rely_on(trace: Path) -> None:
    done = run(trace, "--capacity", "2048,3k,unlimited", "--policy", "lru,lfu,belady", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["trace"], found["block_size"], found["bad_lines"]) == (str(trace), 512, 0)
    assert found["footprint_tokens"] == 8 * 512
    cases = [(one["policy"], one["capacity_tokens"]) for one in found["results"]]
    sizes = [2048, 3000, None]
    assert cases == [(name, size) for name in ("lru", "lfu", "belady") for size in sizes]
    for one in found["results"]:
        assert one["requests"] == 24 and one["prompt_tokens"] == 8 * (1524 + 1524 + 2036)
        assert one["hit_rate"] == one["hit_tokens"] / one["prompt_tokens"]
        assert one["percent_of_belady"] <= 100 or one["policy"] == "belady"
    assert found["results"][-1]["percent_of_belady"] == 100.0


def test_processes_find_what_one_finds(trace: Path) -> None:
    options = (trace, "--capacity", "1k,2k,3k", "--policy", "s3fifo,2q,slru", "--json")
    one, two = run(*options, "--jobs", 1), run(*options, "--jobs", 2)
    assert one.exit_code == two.exit_code == 0, two.output
    assert json.loads(one.stdout) == json.loads(two.stdout)


def test_a_table_for_people(trace: Path) -> None:
    done = run(trace, "--policy", "lru,belady")
    assert done.exit_code == 0, done.output
    assert "Hit rate by capacity" in done.stdout and "4,096" in done.stdout
    assert "\x1b" not in done.stdout


def test_sizes_in_bytes(trace: Path) -> None:
    done = run(trace, "--capacity", "2MiB", "--token-bytes", 1024, "--json")
    assert json.loads(done.stdout)["results"][0]["capacity_tokens"] == 2048
    assert "needs --token-bytes" in run(trace, "--capacity", "2MiB").stderr


def test_bad_lines_are_told(trace: Path) -> None:
    with trace.open("a") as file:
        file.write("nothing\n" * 7)
    done = run(trace, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["bad_lines"] == 7
    assert "line 25 is left out: no JSON" in done.stderr
    assert "7 lines are left out" in done.stderr


@pytest.mark.parametrize(
    "options", [["--policy", "fifo"], ["--capacity", "many"], ["--block-size", "0"]]
)
def test_wrong_usage(trace: Path, options: list[str]) -> None:
    assert run(trace, *options).exit_code == 2


def test_many_cases_do_not_fill_the_pipes(trace: Path) -> None:
    sizes = ",".join(map(str, range(1000, 1400)))
    done = run(trace, "--policy", "lfu,slru", "--capacity", sizes, "--jobs", 2, "--json")
    assert len(json.loads(done.stdout)["results"]) == 800


def test_nothing_to_simulate_is_a_failure(trace: Path) -> None:
    done = run(trace, "--block-size", 1024)
    assert done.exit_code == 1 and "no line of" in done.stderr
    assert run(trace, "--policy", ",").exit_code == 2


def test_dialogues_that_a_template_does_not_take_are_told(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    good = [{"role": "user", "content": "Hi"}]
    bad = [{"role": "user", "content": "Hi", "tool_calls": 3}, {"role": ["x"], "content": None}]
    log.write_text("\n".join(json.dumps(one) for one in (good, {"messages": [3]}, bad, good)))
    done = run(log, "--tokenizer", "demo", "--capacity", "unlimited", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["results"][0]["requests"] >= 2


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello\n")
    done = run(tmp_path / "text")
    assert done.exit_code == 1 and "has no request" in done.stderr


def test_the_production_trace_by_the_command() -> None:
    done = run(data("traces/mooncake_conversation.jsonl"), "--capacity", "3M", "--json")
    (lru, best) = json.loads(done.stdout)["results"]
    assert lru["hit_tokens"] == 20_087_299 and best["policy"] == "belady"


def test_a_chat_log(tmp_path: Path) -> None:
    """Of one's own, in any of the usual shapes; lines that are no dialogue are told."""
    chat = [
        {"role": "system", "content": "You sell flowers. Be brief and kind. " * 20},
        {"role": "user", "content": "A rose?"},
        {"role": "assistant", "content": "Gladly."},
        {"role": "user", "content": "Two!"},
        {"role": "assistant", "content": "Gladly again."},
    ]
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"messages": chat}), "nothing", json.dumps(chat)]
    log.write_text("\n".join(lines))
    options = ("--tokenizer", "demo", "--capacity", "unlimited", "--block-size", 16, "--json")
    done = run(log, *options)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["trace"], found["block_size"], found["bad_lines"]) == (str(log), 16, 1)
    assert found["results"][0]["requests"] == 4 and found["results"][0]["hit_rate"] > 0.6
    assert "line 2 is left out: no JSON" in done.stderr
    log.write_text("nothing\n")
    nothing = run(log, "--tokenizer", "demo")
    assert nothing.exit_code == 1 and "no dialogue of" in nothing.stderr
    missing = run(log, "--tokenizer", tmp_path / "none")
    assert missing.exit_code == 1 and "cannot load" in missing.stderr


def test_chunks_are_made_of_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with Recorder(path, block=4) as recorder:
        for _ in range(2):
            recorder.write(range(20))
    done = run(path, "--block-size", 8, "--capacity", "unlimited", "--policy", "lru", "--json")
    (result,) = json.loads(done.stdout)["results"]
    assert result["hit_tokens"] == 16
    assert "make no chunks of 6" in run(path, "--block-size", 6).stderr
