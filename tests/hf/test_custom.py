"""Model classes as they come with checkpoints: other attention code, caches and signatures, and a liar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

import chunkcache
from tests.models import FULL_ATTENTION, prompt, randomised, run, same, wrapped

HEAD = prompt(64)


class CustomConfig(LlamaConfig):
    model_type = "custom"


def heads_of(x: torch.Tensor, width: int) -> torch.Tensor:
    return x.view(*x.shape[:2], -1, width).transpose(1, 2)


class CustomAttention(nn.Module):
    """Attention through transformers' table of functions."""

    is_causal = True

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        kv = config.num_key_value_heads * self.head_dim
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.k = nn.Linear(config.hidden_size, kv)
        self.v = nn.Linear(config.hidden_size, kv)
        self.o = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, turn: Any, cache: Any, mask: Any) -> torch.Tensor:
        query, key, value = (heads_of(part(x), self.head_dim) for part in (self.q, self.k, self.v))
        query, key = apply_rotary_pos_emb(query, key, *turn)
        key, value = self.remember(cache, key, value)
        return self.o(self.attend(query, key, value, mask).reshape(*x.shape[:2], -1))

    def remember(self, cache: Any, key: Any, value: Any) -> Any:
        return (key, value) if cache is None else cache.update(key, value, self.layer_idx)

    def attend(self, query: Any, key: Any, value: Any, mask: Any) -> Any:
        name = self.config._attn_implementation
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        scaling = self.head_dim**-0.5
        return function(self, query, key, value, mask, scaling=scaling, dropout=0.0)[0]


class OwnAttention(CustomAttention):
    """Attention code of its own; its mask comes from the lengths."""

    def attend(self, query: Any, key: Any, value: Any, mask: Any) -> Any:
        groups = self.num_key_value_groups
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * self.head_dim**-0.5
        new, old = scores.shape[-2:]
        hidden = torch.ones(new, old, dtype=torch.bool).triu(old - new + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2)


class ListAttention(OwnAttention):
    """Its cache is a list: a pair of keys and values per layer."""

    def remember(self, cache: Any, key: Any, value: Any) -> Any:
        if self.layer_idx < len(cache):
            old = cache[self.layer_idx]
            pair = tuple(torch.cat(two, 2) for two in zip(old, (key, value), strict=True))
            cache[self.layer_idx] = pair
            return pair
        cache.append((key, value))
        return key, value


class Shelf:
    """An odd cache: one tensor for keys and values of all layers, and a count."""

    def __init__(self) -> None:
        self.layers: dict[int, torch.Tensor] = {}
        self.seen = 0


class ShelfAttention(OwnAttention):
    def remember(self, cache: Any, key: Any, value: Any) -> Any:
        new = torch.stack([key, value])
        old = cache.layers.get(self.layer_idx)
        cache.layers[self.layer_idx] = new if old is None else torch.cat([old, new], 3)
        return cache.layers[self.layer_idx].unbind()


class CustomBlock(nn.Module):
    def __init__(self, config: PreTrainedConfig, layer_idx: int, kind: type[CustomAttention]):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.attention = kind(config, layer_idx)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor, turn: Any, cache: Any, mask: Any) -> torch.Tensor:
        x = x + self.attention(self.norm(x), turn, cache, mask)
        return x + self.down(torch.tanh(self.up(x)))


class CustomModel(PreTrainedModel, GenerationMixin):
    """All variants share this; what differs is the class of attention, the cache and `forward`."""

    config_class = CustomConfig
    _supports_sdpa = True
    _supports_attention_backend = True
    attention: type[CustomAttention] = CustomAttention
    new_cache: Callable[..., Any] = staticmethod(DynamicCache)

    def __init__(self, config: CustomConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = LlamaRotaryEmbedding(config)
        layers = range(config.num_hidden_layers)
        self.blocks = nn.ModuleList(CustomBlock(config, at, self.attention) for at in layers)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def length(self, cache: Any) -> int:
        return int(cache.get_seq_length())

    def run(self, ids: torch.Tensor, positions: Any, cache: Any, mask: Any) -> Any:
        x = self.embed(ids)
        cache = self.new_cache() if cache is None else cache
        if positions is None:
            positions = torch.arange(ids.shape[1])[None] + self.length(cache)
        turn = self.rotary(x, position_ids=positions)
        if self.attention is CustomAttention:
            mask = create_causal_mask(self.config, x, mask, cache, position_ids=positions)
        for block in self.blocks:
            x = block(x, turn, cache, mask)
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=cache)

    def forward(
        self,
        input_ids: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        use_cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        return self.run(input_ids, position_ids, past_key_values, attention_mask)


class OwnCode(CustomModel):
    attention = OwnAttention


class Listed(CustomModel):
    attention = ListAttention
    new_cache = staticmethod(list)

    def length(self, cache: Any) -> int:
        return cache[0][0].shape[2] if cache else 0


class Shelved(CustomModel):
    attention = ShelfAttention
    new_cache = staticmethod(Shelf)

    def length(self, cache: Any) -> int:
        return cache.seen

    def run(self, ids: torch.Tensor, positions: Any, cache: Any, mask: Any) -> Any:
        out = super().run(ids, positions, cache, mask)
        out.past_key_values.seen += ids.shape[1]
        return out


class Positionless(CustomModel):
    """Its forward takes no positions: it counts what the cache holds."""

    def forward(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        use_cache: Any = None,
    ) -> Any:
        return self.run(input_ids, None, past_key_values, attention_mask)


class OldStyle(OwnCode):
    """As models were before 5.0: positions follow from `cache_position`, which must be given."""

    def forward(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        cache_position: Any = None,
        use_cache: Any = None,
    ) -> Any:
        at = 0 if past_key_values is None else past_key_values.get_seq_length()
        if at and cache_position is None:
            raise ValueError("cache_position is needed behind a prefix")
        positions = torch.arange(input_ids.shape[1]) if cache_position is None else cache_position
        return self.run(input_ids, positions[None], past_key_values, attention_mask)


class OldBoth(CustomModel):
    """Takes positions as well; `cache_position` must say where its cache ends."""

    def forward(
        self,
        input_ids: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        cache_position: Any = None,
        use_cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        at = 0 if past_key_values is None else past_key_values.get_seq_length()
        if at and (cache_position is None or cache_position.tolist()[0] != at):
            raise ValueError("cache_position is needed behind a prefix")
        return self.run(input_ids, position_ids, past_key_values, attention_mask)


class Forgetful(OwnCode):
    """Lies: behind a prefix of some length it begins to count anew."""

    def run(self, ids: torch.Tensor, positions: Any, cache: Any, mask: Any) -> Any:
        fresh = torch.arange(ids.shape[1])[None]
        return super().run(ids, fresh, cache, mask)


class Blind(OwnCode):
    """Lies: it hands a cache back, and never looks at it."""

    def run(self, ids: torch.Tensor, positions: Any, cache: Any, mask: Any) -> Any:
        kept = DynamicCache() if cache is None else cache
        out = super().run(ids, positions, None, mask)
        for number, layer in enumerate(out.past_key_values.layers):
            kept.update(layer.keys, layer.values, number)
        out.past_key_values = kept
        return out


class Cacheless(OwnCode):
    def run(self, ids: torch.Tensor, positions: Any, cache: Any, mask: Any) -> Any:
        out = super().run(ids, positions, None, mask)
        out.past_key_values = None
        return out


class Tupled(OwnCode):
    """Its forward gives a plain tuple."""

    def run(self, ids: torch.Tensor, positions: Any, cache: Any, mask: Any) -> Any:
        return tuple(super().run(ids, positions, cache, mask).values())


class Bidirectional(OwnCode):
    """Every token sees the last one: no prefix stays what it was."""

    def run(self, ids: torch.Tensor, positions: Any, cache: Any, mask: Any) -> Any:
        out = super().run(ids, positions, cache, mask)
        out.logits = out.logits + out.logits[:, -1:]
        return out


def make(kind: type[CustomModel]) -> CustomModel:
    model = kind(CustomConfig(**FULL_ATTENTION["llama"]))
    randomised(model)
    return model


@pytest.mark.parametrize(
    ("kind", "tier"),
    [
        (CustomModel, "A"),
        (OwnCode, "C"),
        (Listed, "C"),
        (Shelved, "D"),
        (Positionless, "C"),
        (OldStyle, "C"),
        (OldBoth, "A"),
    ],
)
def test_a_class_of_ones_own_is_reused_to_the_bit(kind: type[CustomModel], tier: str) -> None:
    model = make(kind)
    cached = wrapped(model)
    assert cached.proof.tier == tier, cached.proof.refused
    assert bool(cached.proof.rows) == (tier == "A")
    run(cached, HEAD + prompt(9, seed=1))
    tokens = HEAD + prompt(9, seed=2)
    hit = run(cached, tokens)
    assert cached.last_reuse[0].cached_tokens == 64
    assert same(hit, run(wrapped(model), tokens))
    with torch.no_grad():
        for step, logits in enumerate(hit.logits):
            plain = model(input_ids=hit.sequences[:, : len(tokens) + step]).logits[:, -1]
            torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Forgetful, "logits of a forward cut at chunks differ"),
        (Blind, "logits of a forward cut at chunks differ"),
        (Cacheless, "gives no past_key_values back"),
        (Tupled, "gives no past_key_values back"),
        (Bidirectional, "differ"),
    ],
)
def test_a_class_that_resumes_wrongly_is_refused(kind: type[CustomModel], reason: str) -> None:
    with pytest.raises(chunkcache.UnsupportedModelError, match=reason):
        wrapped(make(kind))
    report = chunkcache.verify(make(kind), chunk_size=16)
    assert report.tier == "F" and reason in report.reason


@pytest.mark.parametrize("kind", [Positionless, OldStyle, OldBoth, Listed])
def test_rows_of_unequal_length(kind: type[CustomModel]) -> None:
    """Without positions, rows run alone: padding would count."""
    cached = wrapped(make(kind))
    rows = [HEAD, HEAD[:40], prompt(21, seed=1)]
    together = run(cached, *rows)
    for number, row in enumerate(rows):
        alone = run(wrapped(make(kind)), row)
        assert same(together, alone, slice(number, number + 1))
    cached.store.check()


def test_a_generate_of_its_own_is_refused() -> None:
    class Sampler(CustomModel):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return super().generate(*args, **kwargs)

    with pytest.raises(chunkcache.UnsupportedModelError, match=r"generate\(\) of its own"):
        wrapped(make(Sampler))
    model = make(CustomModel)
    model.generate = lambda *args, **kwargs: None
    with pytest.raises(chunkcache.UnsupportedModelError, match=r"generate\(\) of its own"):
        wrapped(model)


def test_what_is_no_model_is_refused() -> None:
    for thing in (nn.Linear(2, 2), object(), None):
        with pytest.raises(chunkcache.UnsupportedModelError, match="PreTrainedModel"):
            chunkcache.wrap(thing)
