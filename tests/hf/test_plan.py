"""Plans against what caches really hold, against arithmetic, and against published shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging import version
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
)

from chunkcache.errors import UnsupportedModelError
from chunkcache.hf.plan import plan
from chunkcache.lab.plan import Plan
from tests.hf import plan_configs
from tests.hf.plan_configs import ONLY_OBSERVED, SMALL, Fields

LENGTH = 39  # beyond all windows; one before a row of 4 or 8 tokens is complete
OWN_CACHE = {"rwkv", "xlstm", "minimax", "recurrent_gemma"}


OLD = {"deepseek_v32", "glm_moe_dsa", "nemotron_h"}  # that once kept other tensors


def config_of(fields: Fields) -> PreTrainedConfig:
    name = fields["model_type"]
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    return CONFIG_MAPPING[name].from_dict(dict(fields))


def small(name: str) -> PreTrainedConfig:
    return config_of(SMALL[name] | {"model_type": name})


def published(name: str) -> Plan:
    """A plan of a published shape, on which both ways agree."""
    config = config_of(getattr(plan_configs, name))
    found = plan(config)
    assert found.method == "observed", found.reason
    calculated = plan(config, observed=False)
    assert found.pieces == calculated.pieces
    assert calculated.method == "configuration"
    return found


# ---- observed, calculated, and held by a real model


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_kind_is_observed(name: str) -> None:
    found = plan(small(name))
    assert found.method == "observed", found.reason
    assert found.complete
    assert found.dtype_source == "assumed"


@pytest.mark.parametrize("name", sorted(SMALL.keys() - ONLY_OBSERVED))
def test_arithmetic_agrees(name: str) -> None:
    if name in OLD and version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip("this version of transformers keeps other tensors")
    for dtype in (torch.bfloat16, torch.float32):
        observed = plan(small(name), dtype)
        calculated = plan(small(name), dtype, observed=False)
        assert observed.pieces == calculated.pieces
        assert observed.mha_token_bytes == calculated.mha_token_bytes
        assert calculated.reason == "not asked for"


@pytest.mark.parametrize("name", sorted(SMALL.keys() - OWN_CACHE - {"t5", "bart"}))
def test_a_real_cache_holds_as_much(name: str) -> None:
    """The model with weights, on numbers: the bytes in its cache are those of the plan."""
    config = small(name)
    expected = plan(config, torch.float32).bytes_at(LENGTH)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    argument = "cache_params" if "mamba" in type(model).__name__.lower() else "past_key_values"
    ids = torch.arange(LENGTH)[None] % 90 + 3
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **{argument: cache})
    assert sum(map(held, cache.layers)) == expected


def held(layer: Any) -> int:
    """Bytes in the tensors of a cache layer."""
    values: list[Any] = []
    for value in vars(layer).values():
        values += value.values() if isinstance(value, dict) else [value]
    tensors = {id(t): t for t in values if isinstance(t, torch.Tensor) and t.is_floating_point()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_unknown_states_are_said_to_be_unknown() -> None:
    found = plan(small("zaya"), observed=False)
    assert not found.complete
    assert found.token_bytes == plan(small("zaya")).token_bytes


@pytest.mark.parametrize("name", ["rwkv", "xlstm", "minimax"])
def test_arithmetic_refuses_caches_of_other_kinds(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="cache of its own kind"):
        plan(small(name), observed=False)


# ---- published shapes


def test_llama_2_13b() -> None:
    found = published("LLAMA_2_13B")
    assert found.token_bytes == 40 * 2 * 5120 * 2 == 819_200
    tokens = (10_000, 100_000, 500_000, 1_000_000)
    gigabytes = [found.bytes_at(length) / 10**9 for length in tokens]
    assert gigabytes == [8.192, 81.92, 409.6, 819.2]
    assert (found.attention, found.factor) == ("MHA", 1)
    assert (found.dtype, found.dtype_source) == ("float16", "configuration")
    assert found.positions == 4096


def test_llama_3_8b() -> None:
    found = published("LLAMA_3_8B")
    assert found.token_bytes == 131_072
    assert (found.attention, found.groups, found.factor) == ("GQA", (8,), 4)
    config = config_of(plan_configs.LLAMA_3_8B)
    assert plan(config, torch.float16).token_bytes == 131_072
    assert plan(config, torch.float32).token_bytes == 262_144


def test_mixtral() -> None:
    found = published("MIXTRAL_8X7B")
    assert found.token_bytes == found.late_token_bytes == 131_072


def test_falcon_7b() -> None:
    found = published("FALCON_7B")
    assert found.token_bytes == 32 * 2 * 64 * 2
    assert (found.attention, found.factor) == ("MQA", 71)


def test_deepseek_v3() -> None:
    found = published("DEEPSEEK_V3")
    assert found.token_bytes == 61 * (512 + 64) * 2 == 70_272
    assert found.mha_token_bytes == 61 * 128 * (192 + 128) * 2 == 4_997_120
    assert (found.attention, found.dtype) == ("MLA", "bfloat16")


def test_deepseek_v2_lite() -> None:
    found = published("DEEPSEEK_V2_LITE")
    assert found.token_bytes == 31_104
    assert found.mha_token_bytes == 276_480


def test_gemma_2_9b() -> None:
    found = published("GEMMA_2_9B")
    assert found.token_bytes == 42 * 8192
    assert found.late_token_bytes == 21 * 8192
    assert found.bytes_at(100_000) == 21 * 8192 * (100_000 + 4095)
    assert found.traits == ("sliding windows",)


def test_gemma_3_27b() -> None:
    found = published("GEMMA_3_27B")
    assert found.token_bytes == 62 * 8192
    assert found.late_token_bytes == 10 * 8192
    assert found.dtype_source == "configuration"


def test_mamba_2() -> None:
    found = published("MAMBA_2_2_7B")
    assert found.token_bytes == 0
    assert found.state_bytes == 64 * ((5120 + 2 * 128) * 4 * 2 + 80 * 64 * 128 * 4)
    assert (found.attention, found.factor, found.heads) == ("recurrent", None, 0)


def test_qwen3_next() -> None:
    found = published("QWEN3_NEXT_80B")
    assert found.token_bytes == 12 * 2 * 2 * 256 * 2
    assert found.state_bytes == 36 * ((2 * 16 + 32) * 128 * 4 * 2 + 32 * 128 * 128 * 4)
    assert (found.attention, found.traits) == ("GQA", ("hybrid",))
    assert found.mha_token_bytes == 48 * 16 * 2 * 256 * 2


# ---- the rest


def test_encoder_decoder() -> None:
    found = plan(small("t5"), torch.float16)
    assert found.token_bytes == found.encoder_token_bytes == 2 * 2 * 48 * 2
    assert found.bytes_at(10, 100) == 110 * found.token_bytes


def test_fields_of_an_unknown_type() -> None:
    fields = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    found = plan(PreTrainedConfig.from_dict(fields | {"dtype": "float16"}))
    assert found.token_bytes == 3 * 2 * 64 * 2
    assert found.method == "configuration"
    other = {"n_embd": 64, "n_layer": 3, "n_head": 4, "num_kv_heads": 2}
    assert plan(PreTrainedConfig.from_dict(other)).token_bytes == 3 * 2 * 32 * 2


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 3}, {"num_attention_heads": 4}])
def test_missing_fields_are_named(fields: Fields) -> None:
    with pytest.raises(UnsupportedModelError, match="its configuration has no "):
        plan(PreTrainedConfig.from_dict(fields))


def test_a_model_that_keeps_nothing() -> None:
    with pytest.raises(UnsupportedModelError, match="keeps nothing between tokens"):
        plan(config_of({"model_type": "openai-gpt", "n_embd": 48, "n_layer": 2, "n_head": 6}))


def test_the_configuration_is_not_changed() -> None:
    config = config_of(plan_configs.LLAMA_3_8B)
    before = config.to_dict()
    plan(config, torch.float32)
    assert config.to_dict() == before
