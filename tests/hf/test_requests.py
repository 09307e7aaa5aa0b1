"""What generate() accepts, refuses and leaves behind."""

import threading

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, pipeline

import chunkcache
from tests.models import DEVICE, FULL_ATTENTION, build, kept, prompt, run, tiny, wrapped


def ids_of(*rows):
    return torch.tensor([list(row) for row in rows], device=DEVICE)


def test_verify_names_tier_and_exactness():
    report = chunkcache.verify(tiny("llama"))
    assert (report.tier, report.bit_exact) == ("A", "rows" if report.rows else "borders")
    assert report.rows or DEVICE != "cpu", "rows are invariant on a CPU"
    assert report.max_logit_error < 1e-4


def test_bad_prompts_are_named_and_lose_nothing():
    cached = wrapped(tiny("llama"))
    run(cached, prompt(40))
    before = cached.stats().chunks
    bad = [
        (chunkcache.EmptyPromptError, ids_of([]).long(), None),
        (chunkcache.EmptyPromptError, ids_of([5, 6], [7, 8]), ids_of([1, 1], [0, 0])),
        (chunkcache.InvalidTokensError, ids_of([5, 128]), None),
        (chunkcache.InvalidTokensError, ids_of([5, -1]), None),
        (chunkcache.InvalidTokensError, torch.ones((1, 3), device=DEVICE), None),
        (chunkcache.InvalidTokensError, ids_of([1, 2, 3])[0], None),
        (chunkcache.PromptTooLongError, ids_of(prompt(513)), None),
        (chunkcache.AttentionMaskError, ids_of([5, 6, 7]), ids_of([1, 1, 0])),
        (chunkcache.AttentionMaskError, ids_of([5, 6, 7]), ids_of([1, 0, 1])),
        (chunkcache.AttentionMaskError, ids_of([5, 6, 7]), ids_of([1, 1])),
        (chunkcache.AttentionMaskError, ids_of([5, 6, 7]), ids_of([1, 2, 1])),
    ]
    for error, ids, mask in bad:
        with pytest.raises(error):
            cached.generate(ids, attention_mask=mask, max_new_tokens=2)
    assert cached.stats().chunks == before
    assert cached.stats().leased_chunks == 0


@pytest.mark.parametrize(
    "extra",
    [
        {"assistant_model": object()},
        {"prompt_lookup_num_tokens": 3},
        {"past_key_values": object()},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"guidance_scale": 2.0},
        {"output_attentions": True},
        {"inputs_embeds": torch.zeros(1, 3, 64)},
        {"penalty_alpha": 0.6},
        {"generation_config": GenerationConfig(use_cache=False)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_what_cannot_be_combined_is_refused(extra):
    cached = wrapped(tiny("llama"))
    with pytest.raises(chunkcache.UnsupportedRequestError):
        cached.generate(ids_of(prompt(20)), max_new_tokens=2, **extra)
    assert cached.stats().requests == 0


def test_states_of_the_model():
    model = build("llama", FULL_ATTENTION["llama"])
    with pytest.raises(chunkcache.TrainingModeError):
        chunkcache.wrap(model.train())
    cached = wrapped(model.eval())
    with pytest.raises(chunkcache.AlreadyWrappedError):
        chunkcache.wrap(cached)
    model.train()
    with pytest.raises(chunkcache.TrainingModeError):
        run(cached, prompt(20))
    model.eval()
    run(cached, prompt(20))
    model.to(torch.bfloat16)
    with pytest.raises(chunkcache.ModelChangedError):
        run(cached, prompt(20))
    cached.close()
    with pytest.raises(chunkcache.ClosedError):
        run(cached, prompt(20))


@pytest.mark.parametrize("way", ["in place", "data", "load_state_dict"])
def test_changed_weights_start_a_new_namespace(way):
    model = build("llama", FULL_ATTENTION["llama"])
    cached = wrapped(model)
    run(cached, prompt(40))
    weight = model.model.layers[0].self_attn.v_proj.weight
    if way == "in place":
        with torch.no_grad():
            weight[3, 5] += 1
    elif way == "data":
        weight.data.mul_(1.5)
    else:
        state = {k: v.clone() for k, v in model.state_dict().items()}
        state["model.layers.0.self_attn.v_proj.weight"] *= 2
        model.load_state_dict(state)
    ours = run(cached, prompt(40))
    assert cached.last_reuse[0].cached_tokens == 0
    plain = run(model, prompt(40))
    torch.testing.assert_close(ours.logits[0], plain.logits[0], atol=1e-5, rtol=1e-5)
    assert len(cached.store.trees()) == 1, "the old chunks are gone"
    cached.store.check()


def test_a_budget_below_one_chunk():
    with pytest.raises(chunkcache.ConfigError, match="one chunk"):
        wrapped(tiny("llama"), device_bytes=100)


def test_the_users_model_is_left_alone():
    model = build("llama", FULL_ATTENTION["llama"])
    hooks = len(model._forward_hooks) + len(model._forward_pre_hooks)
    implementation = model.config._attn_implementation
    before = run(model, prompt(30))
    with wrapped(model) as cached:
        run(cached, prompt(30))
        during = run(model, prompt(30))
    assert torch.equal(before.sequences, during.sequences)
    assert model.config._attn_implementation == implementation
    assert len(model._forward_hooks) + len(model._forward_pre_hooks) == hooks


class StopAfter(StoppingCriteria):
    def __init__(self, calls, error=None):
        self.calls, self.error = calls, error

    def __call__(self, input_ids, scores, **kwargs):
        self.calls -= 1
        if self.calls <= 0 and self.error:
            raise self.error
        return torch.full((input_ids.shape[0],), self.calls <= 0, device=input_ids.device)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=type)
def test_a_failed_request_gives_everything_back(rows, error):
    cached = wrapped(tiny("llama"))
    batch = [prompt(50, seed=n) for n in range(rows)]
    with pytest.raises(type(error)):
        run(cached, *batch, new=9, stopping_criteria=[StopAfter(3, error)])
    stats = cached.stats()
    assert (stats.leased_chunks, stats.tail_bytes) == (0, 0)
    cached.store.check()
    run(cached, *batch)
    assert all(reuse.cached_tokens >= kept(cached, 50) for reuse in cached.last_reuse)


def test_stopping_criteria_and_processors_are_transformers_own():
    model = tiny("llama")
    cached = wrapped(model)
    ours = run(cached, prompt(30), new=20, stopping_criteria=[StopAfter(4)])
    assert len(ours.logits) == 4
    for extra in (
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5]]},
    ):
        for _ in range(2):
            plain, ours = (
                run(model, prompt(30), new=12, **extra),
                run(cached, prompt(30), new=12, **extra),
            )
            assert torch.equal(plain.sequences, ours.sequences)
    config = GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=2, pad_token_id=0)
    ids = ids_of(prompt(30))
    assert torch.equal(model.generate(ids, config), cached.generate(ids, config))


def test_prompts_follow_the_pad_token_as_in_transformers():
    model = tiny("llama")
    cached = wrapped(model)
    ids = ids_of([0, 0, *prompt(20)], prompt(22, seed=1))
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached.generate(ids, max_new_tokens=5, do_sample=False), plain)
    assert [reuse.prompt_tokens for reuse in cached.last_reuse] == [20, 22]


def test_threads_compute_a_shared_prefix_once():
    model = tiny("llama")
    cached, results = wrapped(model), {}
    start = threading.Barrier(6)

    def ask(number):
        start.wait()
        results[number] = (run(cached, prompt(200) + prompt(10, seed=number)), cached.last_reuse[0])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cold = sorted(reuse.cached_tokens for _, reuse in results.values())
    assert cold[0] == 0 and all(tokens >= 192 for tokens in cold[1:])
    for number, (ours, _) in results.items():
        alone = run(wrapped(model), prompt(200) + prompt(10, seed=number))
        assert torch.equal(ours.sequences, alone.sequences)
    assert cached.stats().leased_chunks == 0
    cached.store.check()


def test_preload_names_pins_and_reports():
    cached = wrapped(tiny("llama"), device_bytes=16 * 512 * 12)
    stored = cached.preload(prompt(50), name="support-bot")
    assert stored == kept(cached, 50)
    for seed in range(1, 9):
        run(cached, prompt(100, seed=seed))
    run(cached, prompt(50) + prompt(5, seed=3))
    assert cached.last_reuse[0].cached_tokens >= stored
    stats = cached.stats()
    assert stats.named["support-bot"]["requests"] == 1
    assert stats.pinned_chunks == stored // 16
    assert stats.evicted_chunks > 0
    assert "support-bot" in [name for row in cached.tree_rows() for name in row.names]
    assert "hit rate" in stats._repr_html_()
    with pytest.raises(chunkcache.PromptError, match="least"):
        cached.preload(prompt(10))
    assert cached.flush() > 0
    assert cached.stats().chunks == 0


def test_tenants_share_nothing():
    model = tiny("llama")

    def name(tenant):
        return wrapped(model, tenant=tenant)._state.serving().space.name

    assert len({name(tenant) for tenant in ("a", "b", "")}) == 3
    assert name("a") == name("a")


def test_misses_say_why():
    cached = wrapped(tiny("llama"), device_bytes=16 * 512 * 4)
    run(cached, prompt(40))
    run(cached, prompt(70, seed=1))
    run(cached, prompt(40))
    assert cached.last_reuse[0].reason == "evicted"
    run(cached, prompt(5, seed=2))
    assert cached.last_reuse[0].reason == "shorter than a chunk"


def test_pipeline(demo_model):
    model, tokenizer = demo_model
    cached = chunkcache.wrap(model, tokenizer, chunkcache.Config(border=64))
    plain = pipeline("text-generation", model=model, tokenizer=tokenizer, device=DEVICE)
    ours = pipeline("text-generation", model=cached, tokenizer=tokenizer, device=DEVICE)
    text = "The shop opens at nine. " * 20
    for _ in range(2):
        expected = plain(text, max_new_tokens=8, do_sample=False)
        assert ours(text, max_new_tokens=8, do_sample=False) == expected
    assert cached.last_reuse[0].cached_tokens >= 64
