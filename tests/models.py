"""Tiny random models of many architectures, their device, and what tests look at in a wrapper."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import chunkcache
from chunkcache.hf.model import CachedModel

DEVICE = os.environ.get("CHUNKCACHE_DEVICE", "cpu")  # of tests that compute
TYPES = [torch.float32, torch.bfloat16]
if DEVICE != "cpu":
    TYPES.append(torch.float16)
VOCABULARY = 128
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "word_embed_proj_dim": 64,
    "pad_token_id": 0,
}
FULL_ATTENTION: dict[str, dict[str, Any]] = {
    "llama": _BASE,
    "mha": _BASE | {"num_key_value_heads": 4},
    "mqa": _BASE | {"num_key_value_heads": 1},
    "qwen2": _BASE,
    "qwen3": _BASE | {"head_dim": 16},
    "mistral": _BASE | {"sliding_window": None},
    "phi3": _BASE,
    "phi": _BASE,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT | {"multi_query": True},
    "gpt_neox": _BASE,
    "opt": _OPT,
    "starcoder2": _BASE | {"sliding_window": None},
    "granite": _BASE,
    "olmo": _BASE,
    "olmo2": _BASE,
    "smollm3": _BASE,
    "stablelm": _BASE,
    "nemotron": _BASE,
    "gemma": _BASE | {"head_dim": 16},
    "glm4": _BASE | {"head_dim": 16},
    "cohere": _BASE,
}
_ALIASES = {"mha": "llama", "mqa": "llama"}


@cache
def tiny(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose logits differ clearly between tokens; shared, so do not change it."""
    return build(_ALIASES.get(name, name), FULL_ATTENTION[name], dtype)


def build(
    kind: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model of its own."""
    config = AutoConfig.for_model(kind, **settings)
    return drawn(AutoModelForCausalLM, config).to(dtype).to(DEVICE)


def drawn(kind: Any, config: Any) -> PreTrainedModel:
    """A random model of an auto class, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return randomised(kind.from_config(config))


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """The model with other matrices, always the same, so that logits differ clearly between tokens."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() >= 2:
                weights.normal_(0, 0.08, generator=generator)
    return model.eval()


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def wrapped(model: PreTrainedModel, **settings: Any) -> CachedModel:
    """A wrapper with small chunks and borders."""
    small = {"chunk_size": 16, "border": 32}
    return chunkcache.wrap(model, config=chunkcache.Config(**small | settings))


def kept(cached: CachedModel, tokens: int) -> int:
    """How many tokens of a prefix of so many are stored: whole chunks, or up to a border."""
    settings = cached.settings
    return tokens - tokens % (settings.chunk_size if cached.proof.rows else settings.border)


def run(cached: Any, *prompts: list[int], new: int = 5, **kwargs: Any) -> Any:
    """Greedy generation with the logits of each step, prompts padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    device = cached.device
    return cached.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        **{
            "max_new_tokens": new,
            "min_new_tokens": new,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            "pad_token_id": 0,
        }
        | kwargs,
    )


def same(left: Any, right: Any, rows: Any = slice(None), other: Any = slice(None)) -> bool:
    """Whether two results have the same tokens and bit-equal logits in the named rows."""
    return all(
        torch.equal(a[rows], b[other]) for a, b in zip(left.logits, right.logits, strict=True)
    ) and torch.equal(
        left.sequences[rows, -len(left.logits) :], right.sequences[other, -len(right.logits) :]
    )


def stored(cached: CachedModel) -> dict[tuple[int, ...], list[torch.Tensor]]:
    """Every stored chunk by all tokens up to its end: its keys and values, layer by layer."""
    chunks = {}
    size = cached.proof.layout.chunk_size
    layers = range(len(cached.proof.layout.layers))
    for tree in cached.store.trees():
        for node in tree.walk():
            tokens = node.prefix.tolist()
            for number in range(node.token_count // size):
                key = tuple(tokens[: node.start + (number + 1) * size])
                pairs = [node.run.layer(layer) for layer in layers]
                chunks[key] = [tensor[number].clone() for pair in pairs for tensor in pair]
    return chunks


def agree(left: CachedModel, right: CachedModel) -> int:
    """Asserts that chunks stored by both wrappers are bit-equal; returns how many were compared."""
    ours, theirs = stored(left), stored(right)
    common = ours.keys() & theirs.keys()
    for key in common:
        for a, b in zip(ours[key], theirs[key], strict=True):
            assert torch.equal(a, b), f"chunk that ends at {len(key)}"
    return len(common)
