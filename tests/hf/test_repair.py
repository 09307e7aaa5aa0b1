"""Where transformers resumes differently from how it begins: prompts answer as if run in one piece."""

from __future__ import annotations

import random

import pytest
import torch

import chunkcache
from tests.hf.test_zoo import ask, assert_like_plain, ids, same_bits
from tests.zoo import ZOO, build

LIMITED = {  # Mamba-2 keeps its steps within limits when it scans, but not when it takes one token
    "nemotron_h": {"time_step_min": 0.9},
    "zamba2": {"time_step_min": 0.9},
    "mamba2": {"time_step_limit": (0.9, 1.0)},
    "bamba": {"time_step_limit": (0.9, 1.0)},
    "granitemoehybrid": {"time_step_limit": (0.9, 1.0)},
    "falcon_h1": {"time_step_limit": (0.9, 1.0)},
}


@pytest.mark.parametrize("name", LIMITED)
def test_single_tokens_of_a_prompt_keep_its_limits(name: str) -> None:
    model = build(name, ZOO[name] | LIMITED[name])
    random_ = random.Random(name)
    shared = ids(random_, 48)
    differs = [one_by_one(model, shared + ids(random_, 3)) for _ in range(4)]
    assert max(differs) > 1e-4, "the limits of this model do nothing"
    cached, cold = (chunkcache.wrap(model, config=chunkcache.Config(chunk_size=16)) for _ in "12")
    for rows in (
        [shared],  # ends at a border
        [shared + ids(random_, 1)],
        [shared + ids(random_, 17)],
        [shared + ids(random_, 5), ids(random_, 9), shared[:33]],
        [ids(random_, 1), ids(random_, 2)],
    ):
        hit = ask(cached, rows)
        cold.flush()
        assert same_bits(hit, ask(cold, rows))
        assert_like_plain(hit, model, rows, None)
    assert cached.last_reuse and cached.stats().cached_tokens > 0


def one_by_one(model: torch.nn.Module, prompt: list[int]) -> float:
    """How far logits are from those in one piece, if the last token is run alone."""
    name = "cache_params" if model.config.model_type == "mamba2" else "past_key_values"
    x = torch.tensor([prompt])
    with torch.no_grad():
        whole = model(input_ids=x).logits[0, -1]
        head = model(input_ids=x[:, :-1], use_cache=True)
        given = {name: head[name], "use_cache": True}
        position = torch.tensor([[len(prompt) - 1]])
        if model.config.model_type in ("bamba", "granitemoehybrid"):
            given["position_ids"] = position
        last = model(input_ids=x[:, -1:], **given).logits[0, -1]
    return float((last - whole).abs().max())
