"""Tiny configurations of many architectures: one for each way of keeping state that there is.

`ZOO` has a line per model type; `build` makes a random model of it. A type that an older version of
transformers does not have is skipped by the tests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from tests.models import drawn

Fields = dict[str, Any]

_TOKENS: Fields = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: Fields = _TOKENS | {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}
_GQA: Fields = _SIZES | {"num_key_value_heads": 3}
_WIDE: Fields = _GQA | {"head_dim": 16}  # not hidden size / heads
_WINDOW: Fields = _WIDE | {"sliding_window": 12}
_EXPERTS: Fields = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
}
_LATENT: Fields = _SIZES | {
    "num_key_value_heads": 6,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_INDEX: Fields = {"index_n_heads": 8, "index_head_dim": 16, "index_topk": 64}
_GPT: Fields = _TOKENS | {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 512}
_MAMBA2: Fields = {
    "mamba_d_ssm": 96,
    "mamba_n_heads": 3,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_DELTA: Fields = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
_ALTERNATE = ["linear_attention", "full_attention"] * 2
_TWO_WINDOWS = ["sliding_attention", "full_attention"] * 2
_ENCODED: Fields = _TOKENS | {
    "d_model": 48,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 512,
    "decoder_start_token_id": 0,
}
_PER_LAYER: Fields = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}

ZOO: dict[str, Fields] = {
    "llama": _GQA,
    "qwen3": _WIDE,
    "phi3": _GQA,
    "stablelm": _GQA,
    "smollm3": _GQA,
    "nemotron": _WIDE,
    "diffllama": _GQA | {"num_key_value_heads": 2},
    "doge": _GQA,
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_bigcode": _GPT | {"multi_query": True},
    "gpt_neox": _SIZES,
    "gpt_neo": _TOKENS
    | {
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 6,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 12,
    },
    "opt": _SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 48},
    "bloom": _TOKENS | {"hidden_size": 48, "n_layer": 2, "n_head": 6},
    "mpt": _TOKENS | {"d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 512},
    "falcon": _SIZES | {"multi_query": True, "alibi": False},
    "phimoe": _GQA | _EXPERTS,
    "minimax_m2": _WIDE | _EXPERTS,
    "mistral": _WINDOW,
    "gemma2": _WINDOW | {"query_pre_attn_scalar": 16},
    "gemma3_text": _WINDOW | {"layer_types": _TWO_WINDOWS, "query_pre_attn_scalar": 16},
    "cohere2": _WINDOW,
    "exaone4": _WINDOW | {"sliding_window_pattern": 2},
    "gpt_oss": _WINDOW | _EXPERTS,
    "afmoe": _WINDOW | _EXPERTS,
    "llama4_text": _WIDE | _EXPERTS | {"attention_chunk_size": 12, "intermediate_size_mlp": 64},
    "gemma3n_text": _WINDOW
    | _PER_LAYER
    | {
        "num_kv_shared_layers": 2,
        "layer_types": _TWO_WINDOWS,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": _WINDOW
    | _PER_LAYER
    | {"num_kv_shared_layers": 2, "layer_types": _TWO_WINDOWS, "global_head_dim": 24},
    "deepseek_v2": _LATENT | _EXPERTS,
    "deepseek_v3": _LATENT | _EXPERTS,
    "glm4_moe_lite": _LATENT | _EXPERTS,
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "longcat_flash": _LATENT
    | {
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 4,
        "moe_topk": 2,
        "zero_expert_num": 1,
        "head_dim": 8,
    },
    "deepseek_v32": _LATENT | _EXPERTS | _INDEX,
    "glm_moe_dsa": _LATENT | _EXPERTS | _INDEX,
    "deepseek_v4": _WINDOW
    | _EXPERTS
    | _INDEX
    | {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "q_lora_rank": 24,
        "o_lora_rank": 16,
        "o_groups": 2,
        "qk_rope_head_dim": 8,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "sliding_attention",
        ],
        "compress_rates": {
            "compressed_sparse_attention": 4,
            "heavily_compressed_attention": 8,
        },
    },
    "mamba": _TOKENS | {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 8},
    "falcon_mamba": _TOKENS | {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": _TOKENS
    | {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "state_size": 16,
        "num_heads": 3,
        "head_dim": 32,
        "expand": 2,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "rwkv": _TOKENS
    | {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "attention_hidden_size": 48,
        "context_length": 512,
    },
    "xlstm": _TOKENS
    | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "chunk_size": 8,
        "qk_dim_factor": 1.0,
        "mode": "inference",
    },
    "recurrent_gemma": _WIDE
    | {"num_hidden_layers": 3, "attention_window_size": 12, "lru_width": 48},
    "falcon_h1": _WIDE | _MAMBA2,
    "bamba": _WIDE | _MAMBA2 | {"attn_layer_indices": [1], "num_hidden_layers": 3},
    "granitemoehybrid": _GQA
    | _MAMBA2
    | {
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "jamba": _GQA
    | _EXPERTS
    | {
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "zamba2": _WIDE
    | {
        "mamba_d_state": 8,
        "mamba_headdim": 32,
        "n_mamba_heads": 3,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "use_mem_eff_path": False,
        "adapter_rank": 8,
    },
    "nemotron_h": _WIDE
    | _EXPERTS
    | {
        "ssm_state_size": 16,
        "mamba_num_heads": 3,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "chunk_size": 8,
        "conv_kernel": 4,
        "hybrid_override_pattern": "M*-M",
    },
    "lfm2": _GQA | {"full_attn_idxs": [1, 3], "conv_L_cache": 3},
    "qwen3_next": _WIDE | _EXPERTS | _DELTA | {"layer_types": _ALTERNATE},
    "qwen3_5_text": _WIDE | _DELTA | {"layer_types": _ALTERNATE},
    "olmo_hybrid": _GQA | _DELTA | {"linear_num_value_heads": 2, "layer_types": _ALTERNATE},
    "kimi_linear": _LATENT
    | _EXPERTS
    | {
        "layer_types": _ALTERNATE,
        "linear_attn_config": {
            "num_heads": 2,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
            "kda_layers": [1, 3],
            "full_attn_layers": [2, 4],
        },
    },
    "minimax": _WIDE | _EXPERTS | {"block_size": 4, "layer_types": _ALTERNATE},
    "zaya": _WIDE | _EXPERTS | {"num_experts_per_tok": 1},
    "t5": _TOKENS
    | {
        "d_model": 48,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 3,
        "decoder_start_token_id": 0,
    },
    "bart": _ENCODED | {"decoder_start_token_id": 2},
    "qwen2": _GQA,
    "hunyuan_v1_dense": _WIDE,
    "zamba": _WIDE
    | {
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "n_mamba_heads": 2,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_head_dim": 16,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    "ctrl": _GPT | {"dff": 64},
    "codegen": _GPT | {"n_embd": 64, "n_head": 4, "rotary_dim": 8},
    "xglm": _TOKENS | {"d_model": 48, "ffn_dim": 64, "num_layers": 2, "attention_heads": 6},
    "jetmoe": _GQA | _EXPERTS | {"num_layers": 2, "kv_channels": 16},
    "mixtral": _GQA | _EXPERTS,
    "qwen3_moe": _WIDE | _EXPERTS,
    "lfm2_moe": _GQA
    | _EXPERTS
    | {
        "conv_L_cache": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "pegasus": _ENCODED,
    "mbart": _ENCODED | {"decoder_start_token_id": 2},
    "blenderbot": _ENCODED | {"decoder_start_token_id": 1},
    "xlnet": _TOKENS | {"d_model": 48, "n_layer": 2, "n_head": 6, "d_inner": 64},
    "openai-gpt": _GPT,
}

REFUSED = {
    "recurrent_gemma": "gives no past_key_values back",
    "xlnet": "takes none of past_key_values",
    "openai-gpt": "takes none of past_key_values",
}
_SINCE = {"doge": "5.23"}  # before, it masked the wrong keys of a resumed forward
REUSED = sorted(ZOO.keys() - REFUSED)


@cache
def zoo_model(name: str) -> PreTrainedModel:
    """A random model of the zoo; shared, so do not change it."""
    return build(name, ZOO[name])


def build(name: str, fields: Fields) -> PreTrainedModel:
    """A random model whose logits differ clearly between tokens."""
    if name not in CONFIG_MAPPING or transformers.__version__ < _SINCE.get(name, ""):
        pytest.skip(f"this version of transformers has no {name}, or it resumes wrongly")
    config = AutoConfig.for_model(name, **fields)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return drawn(kind, config)
