"""Models of every tier behind the worker of the server."""

from __future__ import annotations

import queue
import random

import pytest
from transformers import AutoTokenizer

import chunkcache
from chunkcache.demo import model_path
from chunkcache.engine.jobs import Delta, Event, Failed, Finished, Job, Sampling
from chunkcache.engine.runner import Runner
from tests.zoo import zoo_model


def finished(runner: Runner, prompts: list[list[int]]) -> tuple[Finished, list[Delta]]:
    """The last event of a job, and the deltas before it."""
    events: queue.Queue[Event] = queue.Queue()
    runner.submit(Job(prompts, Sampling(6, temperature=0, ignore_eos=True), events.put))
    deltas = []
    while True:
        event = events.get(timeout=60)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            return event, deltas
        deltas.append(event)


@pytest.mark.parametrize(
    ("name", "tier"), [("gemma3_text", "A"), ("bamba", "B"), ("bloom", "C"), ("mamba2", "D")]
)
def test_models_of_every_tier_are_served(name: str, tier: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    config = chunkcache.Config(chunk_size=16)
    with chunkcache.wrap(zoo_model(name), tokenizer, config) as cached:
        assert cached.stats().tier == tier
        runner = Runner(cached)
        try:
            random_ = random.Random(0)
            shared = [random_.randrange(3, 96) for _ in range(50)]
            cold, _ = finished(runner, [shared])
            warm, deltas = finished(runner, [shared, [*shared, 7, 8]])
        finally:
            runner.close()
        assert warm.result.reuse[0].cached_tokens == 48
        assert warm.result.answers[0].tokens == 6
        assert {delta.row for delta in deltas} == {0, 1}
        if tier in "CD":  # rows run alone: bits do not depend on company
            assert warm.result.answers[0].text == cold.result.answers[0].text
        assert cached.stats().leased_chunks == 0


def test_an_encoder_decoder_is_not_served() -> None:
    with (
        chunkcache.wrap(zoo_model("t5"), config=chunkcache.Config(chunk_size=16)) as cached,
        pytest.raises(chunkcache.UnsupportedModelError, match="does not continue its prompt"),
    ):
        Runner(cached)
