"""Masks: rules need no tensor, and what is no rule is not dropped in silence."""

from __future__ import annotations

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
from chunkcache.hf.mask import chunk_mask, mask_widths
from tests.models import randomised

FAR = 600  # tokens; behind the probe's last position


def build(function: Callable[..., Any], width: int | None = None) -> None:
    """Asks for a mask of one row."""
    chunk_mask(function, 1, LlamaConfig(), width)


@given(st.integers(1, 1 << 20))
def test_windows_and_spans_are_rules(width: int) -> None:
    with mask_widths() as widths:
        build(masking_utils.causal_mask_function)
        build(masking_utils.sliding_window_causal_mask_function(width), width)
        build(masking_utils.chunked_causal_mask_function(width, torch.zeros(1, dtype=int)), width)
    assert widths == {width}


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 20))
def test_whatever_lies_over_a_rule_is_refused(width: int, other: int) -> None:
    causal = masking_utils.causal_mask_function
    sliding = masking_utils.sliding_window_causal_mask_function
    masks = [
        (masking_utils.bidirectional_mask_function, None),
        (sliding(width), None),
        (masking_utils.and_masks(causal, masking_utils.sliding_window_overlay(width)), width),
        (masking_utils.and_masks(sliding(width), lambda b, h, q, k: q - k < other), width),
        (masking_utils.or_masks(causal, masking_utils.blockwise_overlay(torch.zeros(1, 4))), None),
        (masking_utils.chunked_causal_mask_function(width, torch.ones(1, dtype=int)), width),
    ]
    if other != width:
        masks.append((sliding(other), width))
    for function, size in masks:
        with pytest.raises(UnsupportedModelError, match="mask of its own"):
            build(function, size)


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
    ids = torch.randint(3, 96, (1, FAR + 100), generator=torch.Generator().manual_seed(1))
    options = {
        "max_new_tokens": 2,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    plain, ours = (each.generate(ids, **options).logits for each in (model, cached))
    for one, other in zip(plain, ours, strict=True):
        assert (one - other).abs().max() < 1e-4


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


@pytest.mark.parametrize(("kind", "tier"), [("full_attention", "C"), ("sliding_attention", "A")])
def test_a_window_that_layers_are_not_told_of_is_kept(
    kind: str, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        modeling_llama, "create_causal_mask", masking_utils.create_sliding_window_causal_mask
    )
    model = far_sighted(sliding_window=FAR, layer_types=[kind] * 2)
    cached = chunkcache.wrap(model)
    assert cached.proof.tier == tier
    assert_plain(model, cached)
