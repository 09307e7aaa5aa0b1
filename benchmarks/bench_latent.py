"""What does latent attention in absorbed form save in a decoding step?

Seconds inside one layer of 32 heads per decoded token, for one row: transformers' own expansion of all
stored latents against chunkcache, on the same weights, in turns. Models are made anew for each repeat.
"""

from __future__ import annotations

import time
from typing import Any

import click
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import chunkcache
from benchmarks.common import median, save
from chunkcache.hf.carrier import Source

FIELDS = {
    "vocab_size": 256,
    "hidden_size": 1024,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 1,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
WARM_UP = 8  # steps that are not counted


class Clock:
    """Seconds spent in a module's forwards."""

    def __init__(self, module: torch.nn.Module):
        self.samples: list[float] = []
        self._begin = 0.0
        module.register_forward_pre_hook(self._start, with_kwargs=True)
        module.register_forward_hook(self._stop, with_kwargs=True)

    def _start(self, *_: object) -> None:
        self._begin = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.samples.append(time.perf_counter() - self._begin)


def steps(
    tokens: int, count: int, dtype: torch.dtype, seed: int
) -> tuple[list[float], list[float]]:
    """Seconds of `count` steps behind so many tokens: expanded, and absorbed."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("deepseek_v3", **FIELDS)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    carrier = chunkcache.wrap(model).proof.carrier
    end = tokens + count + WARM_UP
    ids = torch.randint(3, 256, (1, end), generator=torch.Generator().manual_seed(seed))
    own, ours = (Clock(one.model.layers[0].self_attn) for one in (model, carrier.model))
    state, carried = DynamicCache(config=model.config), carrier.open(Source([]))
    with torch.no_grad():
        model(input_ids=ids[:, :tokens], past_key_values=state, use_cache=True)
        carrier.forward(carried, ids[0, :tokens].tolist())
        for at in range(tokens, end):
            model(input_ids=ids[:, at : at + 1], past_key_values=state, use_cache=True)
            carrier.forward(carried, ids[0, at : at + 1].tolist())
    return own.samples[-count:], ours.samples[-count:]


@click.command()
@click.option("--tokens", default="512,2048")
@click.option("--steps", "count", default=32)
@click.option("--repeats", default=5)
@click.option("--seed", default=0)
def main(tokens: str, count: int, repeats: int, seed: int) -> None:
    """Prints a table and one JSON line; keeps the raw samples in results/."""
    result: dict[str, Any] = {}
    print("type      tokens  expanded ms  absorbed ms  ratio  of each repeat")
    for dtype in (torch.float32, torch.bfloat16):
        for behind in map(int, tokens.split(",")):
            runs = [steps(behind, count, dtype, seed + n) for n in range(repeats)]
            expanded, absorbed = (median([x for run in runs for x in run[side]]) for side in (0, 1))
            ratios = [median(run[0]) / median(run[1]) for run in runs]
            name = str(dtype).removeprefix("torch.")
            result[f"{name}, {behind} tokens"] = {
                "expanded": [run[0] for run in runs],
                "absorbed": [run[1] for run in runs],
                "medians": [expanded, absorbed],
                "ratio": expanded / absorbed,
                "ratios": ratios,
            }
            print(
                f"{name:9} {behind:6} {expanded * 1e3:12.2f} {absorbed * 1e3:12.2f} "
                f"{expanded / absorbed:5.1f}x  {', '.join(f'{ratio:.1f}x' for ratio in ratios)}",
                flush=True,
            )
    settings = {"tokens": tokens, "steps": count, "repeats": repeats, "seed": seed, **FIELDS}
    save("bench_latent", settings, result)


if __name__ == "__main__":
    main()
