"""Windows, spans, soft caps and sinks: against plain attention, and cut in every way."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.attention import reference
from chunkcache.attention.batch import Batch
from chunkcache.attention.groups import Gate
from chunkcache.attention.rule import Rule
from chunkcache.kv import Arena, ChunkLayout, LayerShape
from chunkcache.kv.sequence import Sequence
from tests.attention.world import KERNELS, TOLERANCE, World, agree, cut_in_every_way
from tests.models import DEVICE, TYPES

SHAPES = [(2, 3, 32, 16), (1, 8, 24, 64), (3, 1, 16, 8)]
RULES = {
    "a window of one key": {"window": 1},
    "a window inside a chunk": {"window": 5},
    "a window of a chunk": {"window": 16},
    "a window over chunks": {"window": 50},
    "a window over everything": {"window": 10**10},
    "a span of a chunk": {"span": 16},
    "a span across chunks": {"span": 37},
    "a window and a span": {"window": 40, "span": 64},
    "a soft cap": {"softcap": 2.0},
    "sinks": {"sinks": 1.0},
    "everything": {"window": 33, "span": 48, "softcap": 1.5, "sinks": 0.5},
}


def rule_for(heads, scaling, sinks=None, **more):
    """A rule whose sinks are spread around a number."""
    if sinks is not None:
        more["sinks"] = sinks + torch.linspace(-1, 1, heads).to(DEVICE)
    return Rule(scaling, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RULES)
def test_the_reference_agrees(name, dtype, kernel):
    rule = rule_for(6, 32**-0.5, **RULES[name])
    world = World(2, 3, 32, 16, 150, dtype, kernel, rule=rule)
    assert (world.full.double() - world.expected()).abs().max() < TOLERANCE[dtype]


def borders(size):
    """Numbers of keys around a size, and some of any size."""
    near = [max(1, size + more) for more in (-1, 0, 1)]
    return st.none() | st.sampled_from(near) | st.integers(1, 700)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_cut_no_company_no_layout_shows(name, shape, dtype, data):
    heads, folded, dim, chunk = shape
    limits = borders(chunk) | borders(512)
    rule = rule_for(
        heads * folded,
        dim**-0.5,
        window=data.draw(limits),
        span=data.draw(limits),
        softcap=data.draw(st.none() | st.floats(0.1, 50)),
        sinks=data.draw(st.none() | st.floats(-20, 20)),
    )
    length = data.draw(st.sampled_from([3 * chunk, 9 * chunk, 512 + 2 * chunk])) + 7
    world = World(*shape, length=length, dtype=dtype, kernel=KERNELS[name], rule=rule)
    cut_in_every_way(world, data)


@pytest.mark.parametrize("limit", [{"window": 20}, {"span": 90}], ids=str)
def test_rows_that_see_none_of_what_they_share(limit, kernel):
    """In one product with a row that sees all of it, and among themselves."""
    rule = Rule(0.25, **limit)
    world = World(2, 2, 16, 16, 300, torch.float32, kernel, rule=rule)
    runs = world.runs(4)
    rows = [world.batch(runs) for _ in range(5)]
    for row, end in zip(rows[1:], (64 + 1, 64 + 30, 64 + 31, 64 + 200), strict=True):
        world.forward(row, 64, end)
    for chosen in (rows, rows[2:], [rows[4], rows[2]]):
        together = Batch.join(chosen)
        together.gate = Gate(rows=2, tokens=16)
        for _ in range(20):
            at, out = world.step(together)
            assert agree(out, world.full[at])


def test_chunks_below_every_window_are_not_read(kernel):
    """Nothing of them shows, not even what is no number."""
    rule = Rule(0.25, window=40)
    world = World(1, 4, 16, 16, 1300, torch.float32, kernel, rule=rule)
    (run,) = world.runs(70)
    for tensor in run.layer(0):
        tensor[: (70 * 16 - 40) // 16] = math.nan
    rows = [world.batch([run]) for _ in range(4)]
    for row, end in zip(rows, (1121, 1122, 1200, 1290), strict=True):
        assert agree(world.forward(row, 1120, end), world.full[1120:end])
        assert agree(world.forward(row, end, end + 1), world.full[end : end + 1])
    for gate in (Gate(rows=2), Gate(enabled=False)):
        together = Batch.join(rows)
        together.gate = gate
        at, out = world.step(together)
        assert agree(out, world.full[at])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sink", [-math.inf, -1e30, -200.0, 60.0, 1e30])
def test_sinks_of_any_size(sink, dtype, kernel):
    sinks = torch.tensor([sink, 0.0, sink, 1.0]).to(DEVICE)
    rule = Rule(0.25, window=30, sinks=sinks.to(dtype))
    world = World(2, 2, 16, 16, 90, dtype, kernel, rule=rule)
    assert (world.full.double() - world.expected()).abs().max() < TOLERANCE[dtype]
    if sink > 1:
        assert world.full[:, 0].abs().max() < 1e-12, "all weight is the sink's"
    at, out = world.step(Batch.join([world.batch(world.runs(2)) for _ in range(3)]))
    assert agree(out, world.full[at])


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4, 1e18])
def test_soft_caps_of_scores_of_any_size(scale, kernel):
    for softcap in (0.5, 50.0):
        rule = Rule(0.25, softcap=softcap)
        world = World(1, 2, 16, 16, 60, torch.float32, kernel, rule=rule, scale=scale)
        error = (world.full.double() - world.expected()).abs().max()
        # A score near the cap is right to a digit of the cap, and its weight to that times the cap.
        assert error < 2e-6 + softcap * 2e-6


def test_the_soft_cap_is_a_hyperbolic_tangent(kernel):
    """Two keys with close scores: their weights betray the smallest error, 12 times enlarged."""
    cap, steps = 50.0, 4000
    scores = torch.linspace(-6, 6, steps).to(DEVICE)
    layout = ChunkLayout((LayerShape(1, 16, 16),), 16, torch.float32, torch.device(DEVICE))
    keys, values = torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 2, 16)
    keys[0, 0, 0, 0], keys[0, 0, 1, 0], values[0, 0, 0, 0] = 1.0, 0.97, 1.0
    query = torch.zeros(1, steps, 2, 16)
    query[0, :, :, 0] = scores.unsqueeze(1).cpu()
    rule = Rule(cap, softcap=cap)  # so that the argument of tanh is the product itself
    batch = Batch(layout, [Sequence(16)], Arena(layout), kernel(layout))
    batch.begin([[0, 1]])
    batch.write(0, keys.to(DEVICE), values.to(DEVICE))
    found = batch.attend(0, query.to(DEVICE), rule)[0, 1, :, 0].double().cpu()
    first = torch.tanh(query[0, :, 1, 0].double())
    second = torch.tanh((query[0, :, 1, 0] * keys[0, 0, 1, 0]).double())
    assert (found - torch.sigmoid(cap * (first - second))).abs().max() < 5e-6


def test_a_layer_is_asked_several_times(kernel):
    """Layers that share KV read what one of them wrote, each with a query and a rule of its own."""
    world = World(2, 2, 32, 16, 200, torch.float32, kernel)
    other = torch.randn(1, 8, 200, 32).to(DEVICE)
    rules = [rule_for(8, 0.3, **RULES[name]) for name in ("everything", "a window over chunks")]
    rules += [Rule(0.1), rules[0]]

    def ask(batch, begin, end):
        batch.begin([list(range(begin, end))])
        new = slice(begin, end)
        batch.write(0, world.keys[None, :, new], world.values[None, :, new])
        first = batch.attend(0, world.query[:, :, new], world.rule)[0]
        rest = [batch.attend(0, other[:, :, new], rule)[0] for rule in rules]
        batch.end()
        return first, torch.stack(rest)

    first, rest = ask(world.batch([]), 0, 200)
    assert agree(first, world.full)
    at = torch.arange(200, device=DEVICE)
    operands = [tensor.double() for tensor in (other[0], world.keys, world.values)]
    for found, rule in zip(rest, rules, strict=True):
        expected = reference.attend(*operands, at, rule)
        assert (found.double() - expected).abs().max() < 2e-6
    batch = world.batch(world.runs(3, 4))
    for begin, end in ((112, 170), (170, 171), (171, 200)):
        some, others = ask(batch, begin, end)
        assert agree(some, world.full[begin:end]) and agree(others, rest[:, begin:end])


@pytest.mark.parametrize("name", ["window", "span", "softcap"])
@pytest.mark.parametrize("value", [0, -3, math.nan])
def test_what_no_rule_can_say_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} of attention"):
        Rule(1.0, **{name: value})


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "torch"])
def test_native_kernels_refuse_sinks_of_other_heads(name):
    world = World(2, 2, 16, 16, 40, torch.float32, KERNELS[name])
    world.rule = Rule(0.25, sinks=torch.zeros(3))
    with pytest.raises(ValueError, match=r"layer 0: \(3,\) sinks for 4 query heads"):
        world.forward(world.batch([]), 0, 10)


@given(st.integers(0, 500), st.none() | st.integers(1, 600), st.none() | st.integers(1, 600))
def test_the_first_key_is_the_first_that_the_reference_sees(position, window, span):
    at = torch.arange(position + 3)
    hidden = reference._hidden(at, torch.tensor(position), Rule(1.0, window, span))
    seen = (~hidden).nonzero().flatten().tolist()
    assert seen == list(range(Rule(1.0, window, span).first(position), position + 1))
