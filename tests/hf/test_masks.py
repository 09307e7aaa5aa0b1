"""Masks: rules need no tensor, and what is no rule is not dropped in silence."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils
from transformers.models.llama import modeling_llama

import chunkcache
from chunkcache.errors import UnsupportedModelError
from chunkcache.hf.mask import RuleMask, chunk_mask
from tests.hf.test_zoo import CLOSE, ask, assert_like_plain, ids
from tests.models import randomised

FAR = 600  # tokens; behind the probe's last position


def build(
    function: Callable[..., Any], width: int | None = None, hidden: torch.Tensor | None = None
) -> RuleMask:
    """A mask of one row, for 3 new tokens behind 2."""
    return chunk_mask(function, 1, 3, 5, LlamaConfig(), width, hidden)


@given(st.integers(1, 1 << 20))
def test_windows_and_spans_are_rules(width: int) -> None:
    causal = build(masking_utils.causal_mask_function)
    sliding = build(masking_utils.sliding_window_causal_mask_function(width), width)
    unpadded = torch.zeros(1, dtype=torch.long)
    chunked = build(masking_utils.chunked_causal_mask_function(width, unpadded), width)
    rules = [(mask.window, mask.span) for mask in (causal, sliding, chunked)]
    assert rules == [(None, None), (width, None), (None, width)]
    whole = build(masking_utils.causal_mask_function, hidden=torch.ones(1, 5, dtype=torch.bool))
    assert (whole.window, whole.span) == (None, None)


def test_a_rule_looks_like_a_mask_and_has_no_numbers() -> None:
    mask = build(masking_utils.sliding_window_causal_mask_function(7), 7)
    assert mask.shape == (1, 1, 3, 5) and mask.dtype == torch.bool and mask.dim() == 4
    assert mask.untyped_storage().nbytes() == 1
    for part in (mask[:, :, -1:, :4], mask.to("cpu"), mask.to(torch.float32)):
        assert isinstance(part, RuleMask) and part.window == 7
    for compute in (
        lambda: mask + 1,
        lambda: torch.where(mask, 0, 1),
        lambda: mask.float(),
        lambda: torch.zeros(1, 1, 3, 5).masked_fill(mask, 1),
        lambda: torch.cat([mask, mask]),
        lambda: torch.zeros(1, 1, 3, 5)[mask],
        lambda: torch.zeros(2).to(mask),
        lambda: mask.unbind(0),
        lambda: mask.tolist(),
        lambda: torch.equal(mask, torch.ones(1, 1, 3, 5, dtype=torch.bool)),
    ):
        with pytest.raises(UnsupportedModelError, match="computes with its attention mask"):
            compute()


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 20))
def test_whatever_lies_over_a_rule_is_refused(width: int, other: int) -> None:
    causal = masking_utils.causal_mask_function
    sliding = masking_utils.sliding_window_causal_mask_function
    masks = [
        (masking_utils.bidirectional_mask_function, None),
        (sliding(width), None),
        (causal, width),
        (masking_utils.and_masks(causal, masking_utils.sliding_window_overlay(width)), width),
        (masking_utils.and_masks(sliding(width), lambda b, h, q, k: q - k < other), width),
        (masking_utils.or_masks(causal, masking_utils.blockwise_overlay(torch.zeros(1, 4))), None),
        (masking_utils.chunked_causal_mask_function(width, torch.ones(1, dtype=torch.long)), width),
        (lambda batch, head, query, key, far=other: key <= query, None),
    ]
    if other != width:
        masks.append((sliding(other), width))
    for function, size in masks:
        with pytest.raises(UnsupportedModelError, match="mask of its own"):
            build(function, size)
    hidden = torch.tensor([[False, True, True, True, True]])
    with pytest.raises(UnsupportedModelError, match="mask of its own"):
        build(causal, None, hidden)


def far_sighted(**settings: Any) -> LlamaForCausalLM:
    """A Llama with positions behind FAR."""
    config = LlamaConfig(
        hidden_size=160,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        max_position_embeddings=2048,
        **settings,
    )
    return randomised(LlamaForCausalLM(config))


def assert_plain(model: LlamaForCausalLM, cached: Any) -> None:
    """Short prompts, long ones, and those that go on from what both stored."""
    random_ = random.Random(1)
    first = ids(random_, FAR + 100)
    for row in (first[: FAR - 100], first, first[:FAR] + ids(random_, 60)):
        assert_like_plain(ask(cached, [row]), model, [row], None)


def test_a_mask_that_hides_only_far_keys_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch stands for a model whose forward says so itself."""

    def build_mask(**kwargs: Any) -> Any:
        return masking_utils.create_causal_mask(
            **kwargs, and_mask_function=lambda b, h, q, k: q - k < FAR
        )

    monkeypatch.setattr(modeling_llama, "create_causal_mask", build_mask)
    model = far_sighted()
    cached = chunkcache.wrap(model)
    assert cached.proof.tier == "C"
    assert "mask of its own" in cached.proof.refused["two-phase"]
    assert_plain(model, cached)


@pytest.mark.parametrize("mask", ["sliding_window", "chunked"])
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_the_mask_says_what_a_layer_sees(
    kind: str, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its cache keeps besides."""
    other = getattr(masking_utils, f"create_{mask}_causal_mask")
    monkeypatch.setattr(modeling_llama, "create_causal_mask", other)
    model = far_sighted(sliding_window=FAR, attention_chunk_size=FAR, layer_types=[kind] * 2)
    cached = chunkcache.wrap(model)
    assert cached.proof.tier == "A"
    assert_plain(model, cached)


def test_a_cache_that_forgets_what_the_mask_shows_is_reused_up_to_there() -> None:
    """A configuration with a window that the model's code knows nothing of (once a Mistral's)."""
    model = far_sighted(sliding_window=FAR)
    cached = chunkcache.wrap(model)
    assert (cached.proof.tier, cached.proof.limit) == ("D", FAR)
    assert "forgets" in cached.proof.refused["two-phase"]
    assert_plain(model, cached)
    row = ids(random.Random(2), FAR - 20)
    ask(cached, [row])
    assert_like_plain(ask(cached, [row[:-9]]), model, [row[:-9]], None)
    assert cached.last_reuse[0].cached_tokens >= FAR - 100
    ours, plain = (
        ask(each, [row], max_new_tokens=40, min_new_tokens=40) for each in (cached, model)
    )
    assert torch.equal(ours.sequences, plain.sequences)
    pairs = zip(ours.logits, plain.logits, strict=True)
    assert all(
        (one - other).abs().max() < CLOSE * max(1, other.abs().max()) for one, other in pairs
    )


def test_a_mask_that_changes_later_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_mask(**kwargs: Any) -> Any:
        far = kwargs["inputs_embeds"].shape[1] > FAR
        kind = "sliding_window_causal" if far else "causal"
        return getattr(masking_utils, f"create_{kind}_mask")(**kwargs)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", build_mask)
    model = far_sighted(sliding_window=FAR, layer_types=["full_attention"] * 2)
    cached = chunkcache.wrap(model)
    ask(cached, [ids(random.Random(3), FAR)])
    with pytest.raises(UnsupportedModelError, match="another one than when it was proved"):
        ask(cached, [ids(random.Random(4), FAR + 9)])
