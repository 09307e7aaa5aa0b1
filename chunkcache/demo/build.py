"""The untrained demo model, and how a model and its tokenizer are written to a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chunkcache.demo.start import set_start

VOCAB_SIZE = 2304
MAX_LENGTH = 8192


def make_model(
    tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """Return the untrained model.

    The large RoPE base leaves half of each head all but unrotated, to match content at any
    distance.
    """
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    set_start(model)
    return model.to(dtype)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model (as bfloat16) and tokenizer to `out`.

    Each file is replaced in one step, so that readers always find a whole one.
    """
    fresh = out / "unfinished"
    copy = make_model(tokenizer, torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    copy.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    for file in fresh.iterdir():
        file.chmod(0o644)
        file.replace(out / file.name)
    fresh.rmdir()
