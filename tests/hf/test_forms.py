"""Caches of odd forms: seen through, refused, or noticed when they become something else."""

from __future__ import annotations

import functools
import logging
import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import chunkcache
from chunkcache.hf.form import Form, FormError, Kind, kinds
from tests.hf.test_zoo import ask, assert_like_plain, ids, same_bits
from tests.zoo import ZOO, build

CHUNK = 16


class Odd(DynamicCache):
    """A cache with a buffer, a number and a list of its own."""

    def __init__(self, tokens: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(1, 2, 64, 4, generator=generator)
        self.update(rows[:, :, :tokens], rows[:, :, :tokens] + 1, 0)
        self.seen = tokens
        self.first = seed
        self.window = [torch.ones(3) * tokens]
        self.table = torch.arange(4)


def test_what_grows_what_changes_and_what_stays() -> None:
    form = Form(Odd(4))
    after = [form.read(Odd(tokens)) for tokens in (4, 8, 12)]
    leaves, changing = kinds(after, form.read(Odd(4, seed=1)), [False] * len(form.paths), 4)
    found = {path[-1]: leaf.kind for path, leaf in zip(form.paths, leaves, strict=True)}
    assert found["keys"] == found["values"] == Kind.ROWS
    assert found[0] == Kind.STATE and found["table"] == Kind.CONSTANT
    assert {path[0] for path in changing} == {"seen", "first"}, "numbers of a prompt's own too"


def test_a_copy_has_the_tensors_it_was_given_and_shares_nothing_else() -> None:
    form, cache = Form(Odd(4)), Odd(8)
    ends = form.read(cache)
    other = form.write([tensor.clone() for tensor in ends.tensors], ends.plain)
    assert other.seen == 8 and torch.equal(other.layers[0].keys, cache.layers[0].keys)
    other.window[0].zero_()
    other.layers[0].keys.zero_()
    assert cache.window[0].any() and cache.layers[0].keys.any()


def test_one_tensor_in_two_places_is_two() -> None:
    cache = Odd(4)
    cache.layers[0].values = cache.layers[0].keys
    form = Form(cache)
    assert len(form.paths) == 4
    assert cache.layers[0].values is not cache.layers[0].keys


@pytest.mark.parametrize("part", [type("Bag", (dict,), {})(), object.__new__(object)])
def test_what_cannot_be_seen_through_is_refused(part: Any) -> None:
    cache = Odd(4)
    if isinstance(part, dict):
        part.data = torch.ones(2)  # where a UserDict keeps its items
    cache.extra = part
    with pytest.raises(FormError, match="holds a"):
        Form(cache)


def late(what: str) -> Any:
    """A model whose cache does something new behind 100 tokens, long after the probe looked."""
    model = build("bloom", ZOO["bloom"])
    forward = type(model).forward

    @functools.wraps(forward)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        cache = out.past_key_values
        if cache is not None and cache.get_seq_length() > 100:
            if what == "rewrites":
                cache.layers[0].keys[:, :, :4] *= 1.01
            elif what == "stops":
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, 8:], layer.values[:, :, 8:]
            elif what == "flips":
                cache.layers[1].mode = "late"
            else:
                cache.layers[1].extra = torch.ones(1)
        elif cache is not None:
            cache.layers[1].mode = "early"
        return out

    model.__class__ = type("Late", (type(model),), {"forward": changed})
    return model


@pytest.mark.parametrize("what", ["rewrites", "stops", "flips", "adds"])
def test_a_cache_that_becomes_another_is_not_stored(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = chunkcache.Config(chunk_size=CHUNK)
    with (
        chunkcache.wrap(late(what), config=config) as cached,
        chunkcache.wrap(late(what), config=config) as empty,
        caplog.at_level(logging.WARNING),
    ):
        assert cached.proof.tier == "C"
        random_ = random.Random(what)
        long = ids(random_, 150)
        for tokens in (long, long[:60] + ids(random_, 5), long[:140], long):
            empty.flush()
            assert same_bits(ask(cached, [tokens]), ask(empty, [tokens]))
        cached.store.check()
    assert "this prompt is not stored" in caplog.text


def test_borders_wider_than_chunks_store_what_is_computed_together() -> None:
    """An expert's rows depend on all tokens between two borders."""
    model = build("qwen3_moe", ZOO["qwen3_moe"])
    config = chunkcache.Config(chunk_size=CHUNK, border=4 * CHUNK)
    with (
        chunkcache.wrap(model, config=config) as cached,
        chunkcache.wrap(model, config=config) as e,
    ):
        assert cached.proof.layout.chunk_size == cached.stats().chunk_size == 4 * CHUNK
        random_ = random.Random(0)
        base = ids(random_, 150)
        hits = 0
        for _ in range(15):
            tokens = base[: random_.randint(1, 150)] + ids(random_, random_.randint(0, 60))
            e.flush()
            ours = ask(cached, [tokens])
            hits += cached.last_reuse[0].cached_tokens > 0
            assert same_bits(ours, ask(e, [tokens]))
            assert_like_plain(ours, model, [tokens], None)
        assert hits
