"""`chunkcache simulate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chunkcache.cli.main import main
from click.testing import CliRunner, Result

from chunkcache.lab.traces.recorder import Recorder
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


def test_one_cache_has_no_router_and_one_tier(trace: Path) -> None:
    found = json.loads(run(trace, "--capacity", "2048", "--policy", "lru,s3fifo", "--json").stdout)
    assert (found["tiers"], found["admit"]) == ({}, 1)
    for one in found["results"]:
        assert (one["replicas"], one["router"], one["imbalance"]) == (1, None, None)
        assert one["tiers"] == {"device": one["hit_tokens"]}


def test_replicas_by_router(trace: Path) -> None:
    ways = "random,round-robin,prefix,prefix+load"
    options = (trace, "--capacity", "2k,4k", "--replicas", 2, "--router", ways, "--json")
    done = run(*options)
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["results"]
    own, best = results[:8], results[8:]
    assert [one["router"] for one in own] == ways.split(",") * 2
    assert [(one["policy"], one["capacity_tokens"]) for one in best] == [
        ("belady", 2000),
        ("belady", 4000),
    ]
    for one in own:
        bound = best[one["capacity_tokens"] // 4000]
        assert one["replicas"] == 2 and 1 <= one["imbalance"] <= 2
        assert one["percent_of_belady"] == 100 * one["hit_tokens"] / bound["hit_tokens"]
        assert one["percent_of_belady"] <= 100
    assert [one["router"] for one in best] == [None, None]
    double = run(trace, "--capacity", "3072,7168", "--policy", "belady", "--json")
    hits = [one["hit_tokens"] for one in json.loads(double.stdout)["results"]]
    assert [one["hit_tokens"] for one in best] == hits, "3 and 7 blocks in two caches: 6 and 14"
    assert json.loads(run(*options, "--seed", 1).stdout)["results"] != results
    plain = json.loads(run(trace, "--capacity", "2k", "--replicas", 2, "--json").stdout)
    assert [one["router"] for one in plain["results"]] == ["prefix", None]


def test_tiers_behind_the_device(trace: Path) -> None:
    tiers = ("--tier", "host=2k", "--tier", "disk=unlimited")
    options = (trace, "--capacity", "2048", "--policy", "lru", *tiers)
    done = run(*options, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["tiers"], found["admit"]) == ({"host": 2000, "disk": None}, 1)
    (result,) = found["results"]
    assert list(result["tiers"]) == ["device", "host", "disk"]
    assert sum(result["tiers"].values()) == result["hit_tokens"]
    whole = run(trace, "--capacity", "unlimited", "--policy", "lru", "--json")
    assert result["hit_tokens"] == json.loads(whole.stdout)["results"][0]["hit_tokens"]
    assert result["percent_of_belady"] == 100.0 and result["tiers"]["disk"] > 0
    hot = json.loads(run(*options, "--admit", 3, "--json").stdout)
    assert hot["admit"] == 3 and hot["results"][0]["hit_tokens"] < result["hit_tokens"]
    sized = run(trace, "--capacity", "2k", "--tier", "host=2MiB", "--token-bytes", 1024, "--json")
    assert json.loads(sized.stdout)["tiers"] == {"host": 2048}


def test_tables_of_fleets_and_tiers(trace: Path) -> None:
    options = (
        "--capacity",
        "2k",
        "--replicas",
        3,
        "--router",
        "prefix,random",
        "--tier",
        "host=9k",
    )
    done = run(trace, *options, "--admit", 2)
    assert done.exit_code == 0, done.output
    for text in (
        "3, each of the capacity",
        "9,000 tokens, of what 2 requests used, shared by all replicas",
        "Busiest replica / mean",
        "Hit rate by tier",
        "in one cache as large as all of these together",
    ):
        assert text in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.split()[1:3] == ["random", "lru"]]
    assert line.count("%") == 2, "device and host"
    only = run(trace, "--replicas", 2, "--tier", "host=9k", "--policy", "belady")
    assert only.exit_code == 0 and "Hit rate by tier" not in only.stdout


def test_streams(trace: Path) -> None:
    with trace.open("a") as file:
        file.write("nothing\n" * 2)
    options = (trace, "--capacity", "2k,3k", "--policy", "lru,2q", "--jobs", 2, "--json")
    whole, streamed = run(*options), run(*options, "--stream")
    assert streamed.exit_code == 0, streamed.output
    assert "line 25 is left out: no JSON" in streamed.stderr
    one, other = json.loads(whole.stdout), json.loads(streamed.stdout)
    assert other["footprint_tokens"] is None and other["bad_lines"] == 2
    for result in one["results"]:
        assert result.pop("percent_of_belady") is not None
    for result in other["results"]:
        assert result.pop("percent_of_belady") is None
    assert one["results"] == other["results"]
    table = run(trace, "--capacity", "2k", "--stream")
    assert "lru" in table.stdout and "belady" not in table.stdout and "knows" not in table.stdout


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ([], "needs --capacity"),
        (["--capacity", ","], "needs --capacity"),
        (["--capacity", "2k", "--policy", "lru,belady"], "without belady"),
        (["--capacity", "2k,unlimited"], "without unlimited"),
        (["--capacity", "2k", "--tier", "host=inf"], "without unlimited"),
    ],
)
def test_what_needs_the_whole_trace_does_not_stream(
    trace: Path, options: list[str], why: str
) -> None:
    done = run(trace, "--stream", *options)
    assert done.exit_code == 2 and why in done.stderr


def test_a_large_file_hints_at_streaming(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (trace, "--capacity", "2k", "--policy", "lru")
    assert "Hint" not in run(*options).stderr
    monkeypatch.setattr("chunkcache.cli.simulate._LARGE", 1000)
    assert "--stream needs less memory" in run(*options).stderr
    assert "Hint" not in run(*options, "--stream").stderr


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
    "options",
    [
        ["--policy", "fifo"],
        ["--capacity", "many"],
        ["--block-size", "0"],
        ["--router", "prefix"],
        ["--replicas", "2", "--router", "sticky"],
        ["--replicas", "2", "--router", ","],
        ["--replicas", "0"],
        ["--tier", "host"],
        ["--tier", "=5M"],
        ["--tier", "host=many"],
        ["--tier", "host=2GiB"],
        ["--tier", "device=5M"],
        ["--tier", "host=5M", "--tier", "host=6M"],
        ["--admit", "2"],
        ["--admit", "0", "--tier", "host=5M"],
    ],
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
    done = run(trace, "--block-size", 1024, "--stream", "--capacity", "2k")
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


def test_a_figure_is_written(trace: Path, tmp_path: Path) -> None:
    figure = tmp_path / "a.svg"
    done = run(
        trace, "--policy", "lru,lfu,belady", "--capacity", "1k,2k,unlimited", "--plot", figure
    )
    assert done.exit_code == 0, done.output
    text = figure.read_text()
    assert all(name in text for name in ("lru", "lfu", "belady (bound)"))
    assert run(trace, "--plot", tmp_path / "missing" / "a.svg").exit_code == 1


def test_only_the_first_bad_lines_are_kept(trace: Path) -> None:
    from chunkcache.cli.traces import opened

    with trace.open("a") as file:
        file.write("nothing\n" * 50)
    with opened(trace, None, 1, None) as (found, bad):
        for _ in range(3):
            list(found)
    assert len(bad) == 50 and [line.number for line in bad.first] == [25, 26, 27, 28, 29]
