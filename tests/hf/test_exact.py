"""The contract of exact mode: what the cache held, cuts, decoding and company never show."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models import (
    DEVICE,
    FULL_ATTENTION,
    TYPES,
    agree,
    prompt,
    run,
    same,
    tiny,
    wrapped,
)

CASES = [(kind, "auto") for kind in FULL_ATTENTION]
CASES += [(kind, "torch") for kind in ("llama", "mqa", "gpt2", "opt", "qwen3") if DEVICE == "cpu"]
EDGES = [1, 15, 16, 17, 31, 33, 47, 64, 65, 90]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("kind", "kernel"), CASES)
def test_every_promise_for_every_architecture(kind, kernel, dtype):
    model = tiny(kind, dtype)
    make = partial(wrapped, model, kernel=kernel)
    cold = make()
    if not cold.proof.rows:
        assert DEVICE != "cpu", "rows are invariant on a CPU"
        return hit_equals_cold(model, kernel=kernel)
    warm, cut = make(), make(prefill_step=7)
    tokens = prompt(90)
    reference = run(cold, tokens)
    assert same(run(cut, tokens), reference), "cut anywhere == in one piece"
    for shared in EDGES:
        run(warm, tokens[:shared] + prompt(20, seed=shared))
        assert same(run(warm, tokens), reference), f"hit == cold after sharing {shared}"
        assert warm.last_reuse[0].cached_tokens >= shared // 16 * 16
        warm.flush()
    again = run(cold, tokens)
    assert cold.last_reuse[0].cached_tokens >= 80
    assert same(again, reference), "full hit == cold"
    company = [prompt(n, seed=n) for n in (3, 40)]
    batch = run(make(), company[0], tokens, company[1], tokens[:70] + prompt(9, seed=5))
    assert same(batch, reference, slice(1, 2)), "alone == in a batch"
    answer = reference.sequences[0].tolist() + prompt(40, seed=3)
    cold.flush()
    run(cold, tokens, new=60)
    decoded = list(cold.store.trees()[0].walk())[-1].prefix.tolist()
    assert len(decoded) > len(tokens)
    fresh = make()
    fresh.preload(decoded)
    assert agree(cold, fresh) == len(decoded) // 16, "decoded KV == prefilled KV"
    assert len(answer) > 90
    for wrapper in (cold, warm, cut, fresh):
        wrapper.store.check()
        assert wrapper.stats().leased_chunks == 0


@pytest.mark.parametrize("kind", FULL_ATTENTION)
def test_tokens_and_logits_of_the_plain_model(kind):
    model = tiny(kind)
    for mode in ("exact", "fast"):
        cached = wrapped(model, mode=mode)
        rows = [prompt(50), prompt(9, seed=1), prompt(50)[:33] + prompt(4, seed=2)]
        plain = run(model, *rows, new=8)
        for _ in range(2):
            ours = run(cached, *rows, new=8)
            assert torch.equal(ours.sequences, plain.sequences)
            for a, b in zip(ours.logits, plain.logits, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_history_any_batch(data):
    """Random prompts over shared stems, random batches, a budget that evicts, all types."""
    dtype = data.draw(st.sampled_from(TYPES))
    model = tiny(data.draw(st.sampled_from(["llama", "gpt2", "mqa"])), dtype)
    layout_chunk = 16 * 2 * 2 * 64 * dtype.itemsize
    cached = wrapped(
        model,
        device_bytes=layout_chunk * data.draw(st.integers(2, 30)),
        prefill_step=data.draw(st.sampled_from([5, 16, 1024])),
        two_phase_rows=2,
        two_phase_tokens=16,
    )
    stems = [prompt(60, seed=1), prompt(60, seed=2)]
    lengths = st.integers(0, 60)
    for _ in range(4):
        batch = []
        for _ in range(data.draw(st.integers(1, 4))):
            stem = stems[data.draw(st.integers(0, 1))]
            tail = prompt(data.draw(st.integers(1, 20)), seed=data.draw(st.integers(0, 3)))
            batch.append(stem[: data.draw(lengths)] + tail)
        ours = run(cached, *batch, new=3)
        cached.store.check()
        assert cached.stats().leased_chunks == 0
        if not cached.proof.rows:
            fresh = wrapped(model, exactness="borders")
            assert same(run(fresh, *batch, new=3), ours), "the same call on an empty cache"
            continue
        alone = wrapped(model)
        for number, tokens in enumerate(batch):
            assert same(run(alone, tokens, new=3), ours, slice(None), slice(number, number + 1))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt_bigcode"])
def test_borders_keep_hit_equal_to_cold(kind, dtype):
    hit_equals_cold(tiny(kind, dtype))


def hit_equals_cold(model, **settings):
    """All that the fallback promises: the same call gives the same bits whatever is stored."""
    cached = wrapped(model, exactness="borders", **settings)
    assert cached.stats().exactness == "bit-exact at borders"
    rows = [prompt(90), prompt(70, seed=4), prompt(64) + prompt(20, seed=9), prompt(33)]
    for batch in (rows[:1], rows):
        cached.flush()
        cold = run(cached, *batch, new=4)
        cached.flush()
        run(cached, prompt(65))
        assert cached.stats().chunks * cached.stats().chunk_size == 64
        warm = run(cached, *batch, new=4)
        assert cached.last_reuse[0].cached_tokens == 64
        assert same(warm, cold)
        again = run(cached, *batch, new=4)
        assert same(again, cold)
        assert all(reuse.cached_tokens % 32 == 0 for reuse in cached.last_reuse)
    cached.store.check()


def test_reuse_to_the_token_inside_a_chunk():
    cached = wrapped(tiny("llama"))
    run(cached, prompt(64))
    run(cached, prompt(64)[:41] + prompt(10, seed=8))
    reuse = cached.last_reuse[0]
    rounded = (32, 41, "rounded down to a border of 32 tokens")
    expected = (41, 41, "never seen") if cached.proof.rows else rounded
    assert (reuse.cached_tokens, reuse.divergence, reuse.reason) == expected


def test_parallel_samples_and_beams_share_and_agree_with_the_plain_model():
    model = tiny("llama")
    cached = wrapped(model)
    ids = torch.tensor([prompt(40), prompt(40, seed=1)], device=DEVICE)
    plain = model.generate(
        ids, max_new_tokens=9, num_beams=3, num_return_sequences=2, do_sample=False
    )
    ours = cached.generate(
        ids, max_new_tokens=9, num_beams=3, num_return_sequences=2, do_sample=False
    )
    assert torch.equal(plain, ours)
    for seed in range(3):
        torch.manual_seed(seed)
        plain = model.generate(ids, max_new_tokens=9, do_sample=True, num_return_sequences=4)
        torch.manual_seed(seed)
        ours = cached.generate(ids, max_new_tokens=9, do_sample=True, num_return_sequences=4)
        assert torch.equal(plain, ours)
    assert cached.stats().phase_one == 0, "40 shared tokens are below the gate"
    cached.store.check()
