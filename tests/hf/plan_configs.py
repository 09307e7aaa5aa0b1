"""Small configurations whose caches differ, and published ones, for plans of KV memory.

SMALL has a line for each way of keeping KV that transformers knows; a type that an older version
does not have is skipped by the tests.
"""

from __future__ import annotations

from tests.zoo import ZOO, Fields

# Encoders of their own width and models that are only ever refused say nothing more here.
_OTHERS = {"xlnet", "openai-gpt", "jetmoe", "pegasus", "mbart", "blenderbot"}
SMALL: dict[str, Fields] = {name: fields for name, fields in ZOO.items() if name not in _OTHERS}

# Arithmetic does not know these states, or the cache is of the model's own kind.
ONLY_OBSERVED = {"deepseek_v4", "recurrent_gemma", "zaya", "rwkv", "xlstm", "minimax"}

LLAMA_2_13B: Fields = {
    "model_type": "llama",
    "torch_dtype": "float16",
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "max_position_embeddings": 4096,
}
LLAMA_3_8B: Fields = {
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
MIXTRAL_8X7B: Fields = LLAMA_3_8B | {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "max_position_embeddings": 32768,
}
FALCON_7B: Fields = {
    "model_type": "falcon",
    "torch_dtype": "bfloat16",
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "multi_query": True,
    "parallel_attn": True,
    "alibi": False,
}
DEEPSEEK_V3: Fields = {
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
DEEPSEEK_V2_LITE: Fields = DEEPSEEK_V3 | {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
}
GEMMA_2_9B: Fields = {
    "model_type": "gemma2",
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
# As on the hub: with a vision tower around the text model.
GEMMA_3_27B: Fields = {
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 131072,
    },
}
MAMBA_2_2_7B: Fields = {
    "model_type": "mamba2",
    "torch_dtype": "bfloat16",
    "vocab_size": 50288,
    "hidden_size": 2560,
    "num_hidden_layers": 64,
    "state_size": 128,
    "expand": 2,
    "num_heads": 80,
    "head_dim": 64,
    "n_groups": 1,
    "conv_kernel": 4,
}
QWEN3_NEXT_80B: Fields = {
    "model_type": "qwen3_next",
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "max_position_embeddings": 262144,
}
