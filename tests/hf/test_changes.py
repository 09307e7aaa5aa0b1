"""What must not slip into a stored prefix: other arithmetic, other inputs, another model."""

import threading
from contextlib import contextmanager

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import chunkcache
from chunkcache.attention.partial import partial
from chunkcache.attention.rule import Rule
from chunkcache.attention.workspace import Workspace
from chunkcache.hf import fingerprint, state
from tests.models import (
    DEVICE,
    FULL_ATTENTION,
    build,
    kept,
    prompt,
    run,
    same,
    stored,
    tiny,
    wrapped,
)


def test_large_scores_do_not_overflow_in_float16():
    query = torch.full((1, 1, 4, 64), 40.0, dtype=torch.float16, device=DEVICE)
    keys = torch.full((1, 1, 64, 16), 40.0, dtype=torch.float16, device=DEVICE)
    values = torch.ones(1, 1, 16, 64, dtype=torch.float16, device=DEVICE)
    states = partial(query, keys, values, Rule(64**-0.5), Workspace(torch.device(DEVICE)), "t")
    assert states.m.isfinite().all() and states.o[:, :, 0].eq(16).all()


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_what_is_not_finite_stays_where_it_is(kernel):
    """A token whose values overflow reaches its whole chunk, whatever came before it in there."""
    model = build("llama", FULL_ATTENTION["llama"])
    cached = wrapped(model, kernel=kernel)
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = torch.inf
    tokens = prompt(80)
    bad = [*tokens[:40], 2, *tokens[41:]]
    expected = run(cached, tokens[:60])
    assert expected.logits[0].isfinite().all()
    cached.flush()
    run(cached, bad)
    assert same(run(cached, tokens[:60]), expected)
    assert cached.last_reuse[0].cached_tokens == kept(cached, 32)
    for chunk in stored(cached).values():
        assert all(tensor.isfinite().all() for tensor in chunk)


def test_a_kernel_that_cannot_serve_is_an_error_of_settings():
    with pytest.raises(chunkcache.ConfigError, match="'native'"):
        wrapped(tiny("llama", torch.float64), kernel="native")
    assert wrapped(tiny("llama"), kernel="torch").stats().kernel == "torch"


def test_autocast_is_refused():
    cached = wrapped(tiny("llama"))
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        pytest.raises(chunkcache.UnsupportedRequestError, match="autocast"),
    ):
        run(cached, prompt(20))


@contextmanager
def older_switch():
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def newer_switch():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def test_a_change_during_a_preload_is_called_by_its_name():
    model = build("llama", FULL_ATTENTION["llama"])
    cached = wrapped(model)

    def change(*_):
        with torch.no_grad():
            next(model.parameters()).mul_(1)  # the version counts, whatever the values

    hook = cached.proof.carrier.model.register_forward_hook(change)
    with pytest.raises(chunkcache.ModelChangedError, match="preload it again"):
        cached.preload(prompt(40))
    hook.remove()
    assert cached.preload(prompt(40)) == 32
    assert cached.stats().leased_chunks == 0


def test_a_change_that_is_taken_back_during_a_request_leaves_nothing_behind():
    """Weights are other ones for a while, as when an adapter is tried: the name is the same again."""
    model = build("llama", FULL_ATTENTION["llama"])
    cached = wrapped(model)
    run(cached, prompt(20), new=40)
    undisturbed = cached.stats().chunks
    cached.flush()
    before, weight = cached._state.serving().space, next(model.parameters())

    class Meddler(LogitsProcessor):
        calls = 0

        def __call__(self, ids, scores):
            self.calls += 1
            if self.calls == 10:
                kept = weight.detach().clone()
                with torch.no_grad():
                    weight.mul_(2)
                    cached._state.serving()  # somebody else's request
                    weight.copy_(kept)
            return scores

    run(cached, prompt(20), new=40, logits_processor=LogitsProcessorList([Meddler()]))
    now = cached._state.serving().space
    assert now.name == before.name and now != before
    assert cached.stats().chunks < undisturbed, "the answer was not stored"


@pytest.mark.parametrize("switch", [older_switch, newer_switch])
def test_another_matmul_precision_is_another_namespace_and_proved_anew(switch):
    cached = wrapped(tiny("llama"))
    before, proof = cached._state.serving().space.name, cached.proof
    with switch():
        cold = run(cached, prompt(70))
        assert cached._state.serving().space.name != before
        assert cached.proof is not proof
        run(cached, prompt(90))
        assert same(run(cached, prompt(70)), cold)
        assert cached.last_reuse[0].cached_tokens >= kept(cached, 69)
    assert cached._state.serving().space.name == before


@pytest.mark.parametrize(
    "extra", [{"pixel_values": 1}, {"output_hidden_states": True}, {"max_new_tokenz": 3}], ids=str
)
def test_what_is_not_in_the_prefix_is_refused(extra):
    with pytest.raises(chunkcache.UnsupportedRequestError):
        run(wrapped(tiny("llama")), prompt(20), **extra)


def _hook(model):
    model.model.layers[0].register_forward_hook(lambda *_: None)


def _setting(model):
    model.model.norm.variance_epsilon = 1.0


def _config(model):
    model.config.rms_norm_eps = 0.5


@pytest.mark.parametrize("change", [_hook, _setting, _config])
def test_changes_besides_weights_are_noticed(change):
    model = build("llama", FULL_ATTENTION["llama"])
    cached = wrapped(model)
    run(cached, prompt(20))
    change(model)
    with pytest.raises(chunkcache.ModelChangedError):
        run(cached, prompt(20))


def test_rotary_embeddings_that_change_with_length_stay_in_their_fixed_part():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    settings = FULL_ATTENTION["llama"] | {"rope_parameters": rope, "max_position_embeddings": 128}
    cached = wrapped(build("llama", settings))
    run(cached, prompt(100), new=28)
    with pytest.raises(chunkcache.PromptTooLongError, match="rotary"):
        run(cached, prompt(100), new=29)


def test_a_preload_that_does_not_fit_pins_nothing():
    cached = wrapped(tiny("llama"), device_bytes=16 * 512 * 4)
    with pytest.raises(chunkcache.PoolExhaustedError):
        cached.preload(prompt(100))
    assert cached.stats().pinned_chunks == 0
    assert cached.preload(prompt(64, seed=1)) == 64


def test_a_change_that_changes_nothing_keeps_the_cache():
    model = build("llama", FULL_ATTENTION["llama"])
    cached = wrapped(model)
    cached.preload(prompt(64))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.0)
    run(cached, prompt(70))
    assert cached.last_reuse[0].cached_tokens == 64


def test_a_change_during_a_request_ends_its_storing():
    model = build("llama", FULL_ATTENTION["llama"])
    cached = wrapped(model)

    def change(input_ids, scores, **_):
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(1.01)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    run(cached, prompt(40), new=30, stopping_criteria=[change])
    longest = max((row.start + row.tokens for row in cached.tree_rows()), default=0)
    assert longest <= 40


def test_two_namespaces_under_pressure_do_not_lock_each_other():
    store = wrapped(tiny("llama"), device_bytes=16 * 512 * 6).store
    zeros = [(torch.zeros(1), torch.zeros(1))] * len(store.layout.layers)

    def fill(space):
        for number in range(200):
            store.publish(space, prompt(48, seed=number % 7), lambda first, count: zeros)

    threads = [threading.Thread(target=fill, args=(space,), daemon=True) for space in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    store.check()


def test_close_gives_the_memory_back():
    cached = wrapped(tiny("llama"))
    run(cached, prompt(40))
    cached.close()
    assert cached.store.pool.reserved_bytes == 0


def test_only_real_answer_tokens_are_counted():
    cached = wrapped(tiny("llama"))
    run(cached, prompt(30), new=7)
    assert cached.stats().generated_tokens == 7


def test_weights_that_change_while_they_are_hashed_are_noticed(monkeypatch) -> None:
    """Else what the new ones compute would lie under the name of the old ones, in stores too."""
    model = build("llama", FULL_ATTENTION["llama"])
    cached = chunkcache.wrap(model)
    digest, changed = state.digest_weights, []

    def slow(one):
        found = digest(one)
        if len(changed) < 1:
            with torch.no_grad():
                next(model.parameters()).mul_(2)
            changed.append(True)
        return found

    with torch.no_grad():
        next(model.parameters()).mul_(2)
    monkeypatch.setattr(state, "digest_weights", slow)
    with pytest.raises(chunkcache.ModelChangedError, match="while they were hashed"):
        cached._state.serving()
    space = cached._state.serving().space
    with chunkcache.wrap(model) as fresh:
        assert fresh._state.serving().space.name == space.name
    changed.clear()
    with chunkcache.wrap(model) as during, chunkcache.wrap(model) as fresh:
        assert changed and during._state.serving().space.name == fresh._state.serving().space.name
    cached.close()


def test_preparing_prompts_looks_at_no_weights(monkeypatch, tmp_path) -> None:
    """It runs in the background, where the weights may be changing."""
    model = build("llama", FULL_ATTENTION["llama"])
    config = chunkcache.Config(chunk_size=16, stores=[f"disk:{tmp_path}/store?load=always"])
    with chunkcache.wrap(model, config=config) as cached:
        ids = 2 + torch.arange(64)[None] % 30
        cached.generate(ids, max_new_tokens=1)
        assert cached.settle(30)
        cached.flush()
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        monkeypatch.setattr(state, "digest_weights", lambda one: 1 / 0)
        cached._prefetch(ids[0].tolist())
        assert cached.stats().stores["loaded"] == 0


def test_what_libraries_choose_their_code_by_is_in_the_name(monkeypatch) -> None:
    """Stores are shared by machines; there the same switches, and the same processor, may be missing."""
    model = build("llama", FULL_ATTENTION["llama"])
    names = []
    for switches in ({}, {"MKL_CBWR": "COMPATIBLE"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, {}):
        with monkeypatch.context() as patch:
            for name, value in switches.items():
                patch.setenv(name, value)
            fingerprint._machine.cache_clear()
            with chunkcache.wrap(model) as cached:
                names.append(cached._state.serving().space.name)
    fingerprint._machine.cache_clear()
    assert len(set(names)) == 3 and names[0] == names[3]
