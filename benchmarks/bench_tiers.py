"""What does reuse save in each tier?

Time to first token of `generate(max_new_tokens=1)` with 2,048 shared and 64 private tokens, for random
models of a few ten million parameters: plain model, chunkcache cold (empty cache), chunkcache warm
(the prefix stored, private tokens new each time). Encoder-decoders share the encoder's input.
"""

from __future__ import annotations

from typing import Any

import click
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import chunkcache
from benchmarks.common import interleaved, median, save
from chunkcache.hf.model import CachedModel

VOCABULARY = 16_000
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = _BASE | {"num_key_value_heads": 2, "head_dim": 64}
_LATENT = _BASE | {
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
_MAMBA2 = {
    "mamba_n_heads": 16,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 64,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
_DELTA = {
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("A", "llama", _GQA),
    "gemma 3 (windows of 512)": (
        "A",
        "gemma3_text",
        _GQA
        | {
            "sliding_window": 512,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 3,
        },
    ),
    "minicpm3 (latent)": ("A", "minicpm3", _LATENT),
    "granite 4 (Mamba-2 and attention)": (
        "B",
        "granitemoehybrid",
        _GQA
        | _MAMBA2
        | {
            "num_local_experts": 0,
            "shared_intermediate_size": 1536,
            "layer_types": ["mamba", "mamba", "mamba", "attention"] * 2,
        },
    ),
    "qwen 3.5 (gated delta and attention)": (
        "B",
        "qwen3_5_text",
        _GQA | _DELTA | {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2},
    ),
    "bloom": (
        "C",
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 512, "n_layer": 8, "n_head": 8},
    ),
    "mamba 2": (
        "D",
        "mamba2",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "state_size": 64,
            "num_heads": 16,
            "head_dim": 64,
            "expand": 2,
            "n_groups": 1,
        },
    ),
    "mamba": (
        "D",
        "mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 512, "num_hidden_layers": 8, "state_size": 16},
    ),
    "t5": (
        "E",
        "t5",
        {
            "vocab_size": VOCABULARY,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 1536,
            "num_layers": 6,
            "num_heads": 8,
            "decoder_start_token_id": 0,
        },
    ),
}


def build(kind: str, fields: dict[str, Any], seed: int) -> Any:
    """A random model."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **fields)
    factory = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return factory.from_config(config).eval()


class Prompts:
    """A fixed shared part and fresh private tokens; an encoder's input is the shared part."""

    def __init__(self, model: Any, shared: int, private: int, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._encodes = bool(model.config.is_encoder_decoder)
        self._private = private
        self._shared = self._ids(shared)

    def _ids(self, count: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (1, count), generator=self._generator)

    def next(self) -> dict[str, torch.Tensor]:
        """Arguments of generate()."""
        fresh = self._ids(self._private)
        if self._encodes:
            start = torch.zeros(1, 1, dtype=torch.long)
            return {"inputs": self._shared, "decoder_input_ids": torch.cat([start, fresh], 1)}
        return {"inputs": torch.cat([self._shared, fresh], 1)}


def first_token(model: Any, prompts: Prompts) -> None:
    """One greedy token."""
    model.generate(**prompts.next(), max_new_tokens=1, do_sample=False, use_cache=True)


def measure(model: Any, cached: CachedModel, prompts: Prompts, repeats: int) -> dict[str, Any]:
    """Samples of plain, cold and warm runs."""
    calls = {
        "plain": lambda: first_token(model, prompts),
        "cold": lambda: first_token(cached, prompts),
    }
    interleaved(calls, 1, cached.flush)
    samples = interleaved(calls, repeats, cached.flush)
    warm = {"warm": lambda: first_token(cached, prompts)}
    interleaved(warm, 2)
    samples |= interleaved(warm, 3 * repeats)
    mid = {name: median(values) for name, values in samples.items()}
    reuse = cached.last_reuse[0]
    return {
        "samples": samples,
        "medians": mid,
        "cold / warm": mid["cold"] / mid["warm"],
        "plain / warm": mid["plain"] / mid["warm"],
        "cost at 0 % hits": mid["cold"] / mid["plain"] - 1,
        "cached tokens": reuse.cached_tokens,
        "exactness": cached.stats().exactness,
    }


@click.command()
@click.option("--shared", default=2048)
@click.option("--private", default=64)
@click.option("--repeats", default=3)
@click.option("--only", default="", help="Models whose name begins so.")
@click.option("--seed", default=0)
def main(shared: int, private: int, repeats: int, only: str, seed: int) -> None:
    """Prints a table and one JSON line; keeps the raw samples in results/."""
    rows: dict[str, Any] = {}
    print(
        "tier model                                 plain ms cold ms warm ms cold/warm plain/warm miss cost"
    )
    for name, (tier, kind, fields) in MODELS.items():
        if not name.startswith(only):
            continue
        model = build(kind, fields, seed)
        with chunkcache.wrap(model) as cached:
            assert cached.proof.tier == tier, (name, cached.proof)
            found = measure(model, cached, Prompts(model, shared, private, seed), repeats)
        rows[name] = {"tier": tier} | found
        mid = found["medians"]
        print(
            f"{tier:4} {name:37} {mid['plain'] * 1e3:8.0f} {mid['cold'] * 1e3:7.0f} {mid['warm'] * 1e3:7.1f} "
            f"{found['cold / warm']:8.1f}x {found['plain / warm']:9.1f}x {found['cost at 0 % hits']:+9.0%}",
            flush=True,
        )
    settings = {"shared": shared, "private": private, "repeats": repeats, "seed": seed}
    save("bench_tiers", settings, {"first token": rows})


if __name__ == "__main__":
    main()
