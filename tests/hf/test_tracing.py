"""A recorded trace tells what the cache did, and the simulator does the same with it."""

from __future__ import annotations

import os
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chunkcache
from chunkcache.demo import model_path
from chunkcache.lab.simulation.simulator import Simulator
from chunkcache.lab.traces.dialogues import Asker, interleave, read_dialogues
from chunkcache.lab.traces.recorder import Recorder
from chunkcache.lab.traces.trace import Trace
from chunkcache.tree import named_policy, unpack
from tests.hf.test_zoo import ask, ids
from tests.lab.traces import data
from tests.zoo import zoo_model

REPLAYED = int(os.environ.get("CHUNKCACHE_REPLAYED", "60"))  # requests of each case
CONTEXT = int(os.environ.get("CHUNKCACHE_CONTEXT", "3800"))  # tokens; the model has 8,192
TOGETHER = 3  # dialogues
CHUNK = 64


def prompts() -> list[list[int]]:
    """What agents asked, cut to a context, in the built-in model's tokens."""
    asker = Asker(AutoTokenizer.from_pretrained(model_path()))
    dialogues = read_dialogues(data("conversations/tau_airline_gpt4o.json"))
    turns = interleave(map(asker.turns, dialogues), TOGETHER)
    return [turn.prompt[:CONTEXT] for turn in islice(turns, REPLAYED)]


@pytest.mark.parametrize(("chunks", "policy"), [(50, "lru"), (66, "gdlf"), (90, "lru")])
def test_the_simulator_decides_as_the_live_cache_does(
    chunks: int, policy: str, tmp_path: Path
) -> None:
    """Every hit length, over agents whose prompts and answers the pool cannot all hold."""
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    with chunkcache.wrap(model) as cached:
        size = cached.store.layout.chunk_bytes
    config = chunkcache.Config(chunk_size=CHUNK, device_bytes=chunks * size, policy=policy)
    live: list[int] = []
    with chunkcache.wrap(model, config=config, trace=tmp_path / "trace") as cached:
        for tokens in prompts():
            cached.generate(torch.tensor([tokens]), max_new_tokens=2, do_sample=False)
            live.append(cached.last_reuse[0].cached_tokens)
        assert cached.store.pool.capacity == chunks
        evicted = cached.store.flow.evicted
    trace = Trace(tmp_path / "trace")
    cache = Simulator(trace.form, CHUNK, chunks, named_policy(policy), unit=1)
    requests = list(trace)
    assert [cache.request(one) for one in requests] == live
    assert [one.reuse["cached_tokens"] for one in requests if one.reuse] == live
    assert cache.evicted == evicted > 0


def test_a_trace_has_prompts_answers_and_reuse(tmp_path: Path) -> None:
    model = zoo_model("llama")
    config = chunkcache.Config(chunk_size=16, tenant="a")
    path = tmp_path / "trace"
    with chunkcache.wrap(model, config=config, trace=path) as cached:
        head = ids(random.Random(1), 40)
        cached.preload(head, name="bot")
        for rows in ([[*head, 1, 2]], [[*head, 3], [4, 5]]):
            ask(cached, rows)
    first, second, third = Trace(path)
    assert [unpack(one.keys).tolist() for one in (first, second, third)] == [
        [*head, 1, 2], [*head, 3], [4, 5],
    ]  # fmt: skip
    assert (first.prompt, second.prompt, third.prompt) == ("bot", "bot", "")
    assert first.tenant == "a" and first.output > 0
    assert first.reuse is not None and first.reuse["cached_tokens"] == 32
    assert first.time <= second.time <= third.time


def test_hashes_of_a_live_cache(tmp_path: Path) -> None:
    config = chunkcache.Config(chunk_size=16)
    recorder = Recorder(tmp_path / "trace", block=16)
    with chunkcache.wrap(zoo_model("llama"), config=config, trace=recorder) as cached:
        row = ids(random.Random(2), 50)
        ask(cached, [row])
        ask(cached, [row])
    one, two = Trace(tmp_path / "trace")
    assert one.keys == two.keys and len(one.keys) == 8 * 3
    recorder.close()


def test_a_trace_that_cannot_be_written_costs_no_request(tmp_path: Path, caplog) -> None:
    recorder = Recorder(tmp_path / "trace")
    with chunkcache.wrap(zoo_model("llama"), trace=recorder) as cached:
        recorder.close()
        for _ in range(2):
            ask(cached, [ids(random.Random(2), 50)])
    assert caplog.text.count("nothing is recorded any more") == 1
    with pytest.raises(chunkcache.TraceError):
        chunkcache.wrap(zoo_model("llama"), trace=tmp_path / "none" / "trace")


def test_a_miss_is_explained_with_its_text() -> None:
    """Where prompts part, with what was stored there."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    first, second = (
        tokenizer(f"{'You help people. ' * 5}Today is {day}. {'Be kind. ' * 40}")["input_ids"][:129]
        for day in ("Monday", "Friday")
    )
    with chunkcache.wrap(model, tokenizer) as cached:
        assert cached.explain() == []
        for tokens in (first, second, second):
            cached.generate(torch.tensor([tokens]), max_new_tokens=2, do_sample=False)
            (found,) = cached.explain()
            assert found.reuse == cached.last_reuse[0]
            if tokens is first:
                assert (found.before, found.stored) == ("", "")
        assert found.prompt == found.stored == "" and "all" in str(found)
        cached.flush()
        for tokens in (first, second):
            cached.generate(torch.tensor([tokens]), max_new_tokens=2, do_sample=False)
        (found,) = cached.explain()
    assert "Today is" in found.before
    assert "day" in found.before + found.stored and found.stored != found.prompt
    at = found.reuse.divergence
    assert at is not None and first[:at] == second[:at] and first[at] != second[at]
    assert tokenizer.decode(second[at : at + 12]) == found.prompt
    assert tokenizer.decode(first[at : at + 12]) == found.stored
    assert found.prompt in str(found) and f"{at + 1:,}" in str(found)


def test_a_wrapper_reports_its_last_prompts() -> None:
    model = zoo_model("llama")
    config = chunkcache.Config(chunk_size=16, tenant="me", history_bytes="1MiB")
    with chunkcache.wrap(model, config=config) as cached:
        with pytest.raises(chunkcache.TraceError):
            cached.report()
        head = ids(random.Random(1), 64)
        for number in range(4):
            ask(cached, [[*head, number, 5], [*head, 7, number]])
        report, stats = cached.report(price=1.0), cached.stats()
    assert report.source == "recorded"
    assert (report.requests, report.prompt_tokens) == (stats.requests, stats.prompt_tokens)
    assert report.cached_tokens == stats.cached_tokens > 0
    assert report.tiers == stats.tiers == {"device": stats.cached_tokens}
    assert report.cache.capacity_tokens == stats.capacity_bytes // stats.token_bytes
    assert report.token_seconds is not None and stats.saved_seconds is not None
    assert report.money is not None and "<table>" in report._repr_html_()
    assert stats.tenant == "me" and list(report.tenants) != ["me"]  # a hash of it
