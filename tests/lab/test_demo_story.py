"""The demo's numbers add up, and its text says them."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkcache.demo import model_path
from chunkcache.lab.demo_story import NAME, Story, run_story
from chunkcache.lab.views.demo import tell


@pytest.fixture(scope="module")
def story() -> Story:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    return run_story(model, tokenizer, users=3, fact_tokens=300)


def test_everybody_gets_the_plain_answer(story: Story) -> None:
    assert len(story.visits) == 3
    assert all(visit.same for visit in story.visits)


def test_only_questions_are_computed(story: Story) -> None:
    first, *others = (visit.cached_tokens for visit in story.visits)
    assert first == story.preload_tokens
    assert all(tokens >= first for tokens in others)  # a chunk of the first user's may help too
    assert story.stats.named[NAME]["requests"] == 3
    assert story.stats.cached_tokens == first + sum(others)
    assert story.private_bytes - story.shared_bytes == (
        2 * story.preload_tokens * story.stats.token_bytes
    )


def test_json(story: Story) -> None:
    read = json.loads(json.dumps(story.to_dict()))
    assert read["users"] == read["same_answers"] == 3
    assert read["stats"]["hit_rate"] == story.stats.hit_rate
    assert read["tree"][0]["names"] == [NAME]


def test_text(story: Story) -> None:
    out = io.StringIO()
    tell(story, Console(file=out, width=120))
    for wanted in (story.shop, "3 users", "times faster", "hit rate", NAME, "3 of 3"):
        assert wanted in out.getvalue(), wanted


def test_too_many_users() -> None:
    with pytest.raises(ValueError, match="users"):
        run_story(None, None, users=1000)
