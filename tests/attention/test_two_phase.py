"""Two-phase attention against one plain softmax, and against itself cut in every other way."""

import math
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.attention import choice, reference
from chunkcache.attention.batch import Batch
from chunkcache.attention.groups import Decisions, Gate, group_rows
from chunkcache.attention.partial import (
    Mask,
    States,
    Total,
    finish,
    fold,
    keeps_rows,
    natural,
    partial,
)
from chunkcache.attention.rule import Rule
from chunkcache.attention.torch_kernel import TorchKernel
from chunkcache.attention.workspace import Workspace, padded_size
from chunkcache.errors import ConfigError
from chunkcache.kv import ChunkLayout, LayerShape
from chunkcache.native import library
from chunkcache.native.library import SETS, libraries
from tests.attention.world import KERNELS, TOLERANCE, World, agree, cut_in_every_way
from tests.models import DEVICE, TYPES

SHAPES = [
    (4, 4, 64, 64),
    (2, 1, 16, 16),
    (1, 8, 32, 64),
    (3, 2, 80, 32),
    (4, 2, 8, 16),
]
MANY = (1, 300, 16, 128)  # heads of queries
ODD = [(2, 3, 9, 5), (2, 1, 20, 10)]
CASES = [(name, shape) for name in KERNELS for shape in SHAPES + ODD]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, *ODD, MANY], ids=str)
def test_the_reference_agrees(shape, dtype, kernel):
    world = World(*shape, length=3 * shape[3] + 5, dtype=dtype, kernel=kernel)
    assert (world.full.double() - world.expected()).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dims", [(24, 40), (40, 24), (7, 33)], ids=str)
def test_values_may_be_wider_or_narrower_than_keys(dims, kernel):
    world = World(2, 2, dims[0], 16, 60, torch.float32, kernel=kernel, wide=dims[1])
    torch.testing.assert_close(world.full.double(), world.expected(), atol=2e-6, rtol=1e-5)
    together = Batch.join([world.batch(world.runs(2)) for _ in range(3)])
    at, out = world.step(together)
    torch.testing.assert_close(out, world.full[at], atol=2e-6, rtol=1e-5)


def test_more_rows_than_fit_in_a_tile(kernel):
    """32 rows of 13 heads share one run of chunks, and then part."""
    world = World(1, 13, 16, 16, 90, torch.float32, kernel=kernel)
    runs, rows = world.runs(3), []
    for row in range(32):
        rows.append(world.batch(runs))
        if row:
            world.forward(rows[-1], 48, 48 + row)
    together = Batch.join(rows)
    together.gate = Gate(rows=2, tokens=16)
    at, out = world.step(together)
    assert len(together.groups()[0].rows) == 32
    assert agree(out, world.full[at])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_cut_no_company_no_layout_shows(name, shape, dtype, data):
    assert_nothing_shows(name, shape, dtype, data)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_nothing_shows_with_many_heads(name, dtype, data):
    assert_nothing_shows(name, MANY, dtype, data)


def assert_nothing_shows(name, shape, dtype, data):
    length = (max(1, 512 // shape[3]) + 3) * shape[3] + 3
    world = World(*shape, length=length, dtype=dtype, kernel=KERNELS[name])
    if not world.kernel(world.layout).keeps_rows:
        assert name == "torch" and dtype == torch.float32 and shape in [*ODD, MANY]
        return
    cut_in_every_way(world, data)


def test_native_kernels_are_built_where_they_can_be():
    """A build that fails is not an error, since a compiler is optional; it must not go unnoticed."""
    found, missing = libraries()
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler and os.uname().machine == "x86_64":
        assert all(name in found or "lacks" in missing[name] for name in SETS), missing
    assert all(choice.sound(name, dtype) for name in found for dtype in TYPES)


def test_modules_of_other_sources_are_left_alone(monkeypatch):
    monkeypatch.setattr(library, "VERSION", -1)
    found, missing = libraries.__wrapped__()
    assert not found and all("other sources" in missing[name] for name in libraries()[0])


def test_a_module_that_fails_its_check_does_not_serve(monkeypatch, caplog):
    monkeypatch.setattr(choice, "sound", lambda name, dtype: None)
    found, missing = choice.best.__wrapped__(torch.float32)
    assert "attention runs in torch" in caplog.text
    assert found is None and all("failed" in missing[name] for name in libraries()[0])


def test_a_kernel_that_is_not_to_be_had_says_why():
    layout = ChunkLayout((LayerShape(1, 8, 8),), 16, torch.float64, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"no code for torch\.float64"):
        choice.choose(layout, "native")
    assert isinstance(choice.choose(layout)(layout), TorchKernel)


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "torch"])
def test_native_kernels_refuse_what_they_could_not_read(name):
    """They are handed addresses: nothing behind this check would notice."""
    world = World(2, 2, 16, 16, 40, torch.float32, kernel=KERNELS[name])
    query = world.query[:, :, :10]
    cases = [(query[:, :, :9], 0.25), (query[..., :8], 0.25), (query[:, :3], 0.25)]
    for wrong, scaling in [*cases, (query.to("meta"), 0.25), (query, -0.25)]:
        batch = world.batch([])
        batch.begin([list(range(10))])
        with pytest.raises(ValueError, match="layer 0"):
            batch.attend(0, wrong, Rule(scaling))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_show(threads, kernel):
    before = torch.get_num_threads()
    full = World(2, 3, 32, 16, 300, torch.bfloat16, kernel=kernel).full
    try:
        torch.set_num_threads(threads)
        assert torch.equal(World(2, 3, 32, 16, 300, torch.bfloat16, kernel=kernel).full, full)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_a_number_is_not_hidden(value, kernel):
    world = World(1, 2, 16, 16, 40, torch.float32, kernel=kernel)
    world.keys[0, 20, 3] = value
    batch = world.batch([])
    out = world.forward(batch, 0, 40)
    assert out[:20].isfinite().all()
    assert out[21:].isnan().any(), "as plain attention gives it"


def test_scores_of_any_size(kernel):
    """No overflow, and weights that vanish vanish."""
    world = World(1, 1, 16, 16, 40, torch.float32, kernel=kernel)
    for scale in (1e-4, 30.0, 3000.0):
        world.query *= scale
        out = world.forward(world.batch([]), 0, 40)
        torch.testing.assert_close(out.double(), world.expected(), atol=2e-3, rtol=2e-3)
        world.query /= scale


def test_groups_follow_the_chunks_that_rows_share():
    world = World(2, 1, 16, 16, 100, torch.float32)
    stem = world.runs(2)
    branch, other = world.pool.allocate(1), world.pool.allocate(2)
    head, tail = stem[0].split(1)
    rows = [
        world.sequence([stem[0], branch]),
        world.sequence([head, tail, other]),
        world.sequence([head]),
        world.sequence([]),
        world.sequence([*stem, other]),
    ]
    decisions = Decisions()
    groups = group_rows(rows, Gate(rows=2, tokens=16), 16, decisions)
    found = [(group.run.slab, group.run.start, len(group.run), group.rows) for group in groups]
    start = stem[0].start
    assert (0, start, 1, (0, 1, 2, 4)) in found, "one divergent row does not end the sharing"
    assert (0, start + 1, 1, (0, 1, 4)) in found
    assert (0, branch.start, 1, (0,)) in found
    assert (0, other.start, 2, (1, 4)) in found
    assert len(found) == 4 and (decisions.grouped, decisions.refused) == (3, 0)
    for number, sequence in enumerate(rows):
        read = [
            group.run.start + at
            for group in groups
            if number in group.rows
            for at in range(len(group.run))
        ]
        kept = [run.start + at for run in sequence.shared for at in range(len(run))]
        assert read == kept, "in order of position, each once"


@pytest.mark.parametrize("gate", [Gate(enabled=False), Gate(rows=3), Gate(tokens=33)])
def test_the_gate_refuses_and_counts(gate):
    world = World(2, 1, 16, 16, 100, torch.float32)
    stem = world.runs(2)
    decisions = Decisions()
    groups = group_rows([world.sequence(stem)] * 2, gate, 16, decisions)
    assert [group.rows for group in groups] == [(0,), (1,)]
    assert (decisions.grouped, decisions.refused) == (0, 1)


def test_plans_are_made_again_only_on_change():
    world = World(2, 1, 16, 16, 100, torch.float32)
    batch = Batch.join([world.batch(world.runs(2)) for _ in range(2)])
    world.step(batch)
    groups = batch.groups()
    for _ in range(20):
        world.step(batch)
    assert batch.groups() is groups
    assert batch.select([1, 0]).groups() is not groups


def test_a_failed_forward_leaves_the_batch_as_it_was():
    world = World(2, 2, 16, 16, 100, torch.float32)
    batch = world.batch([])
    world.forward(batch, 0, 20)
    batch.begin([[1, 2, 3]])
    batch.write(0, *torch.randn(2, 1, 2, 3, 16, device=DEVICE))
    assert batch.sequences[0].length == 20
    assert agree(world.forward(batch, 20, 47), world.full[20:47])


def test_states_are_the_textbooks():
    """o, m and l of a chunk, m in natural logarithm after `natural`; an unseen chunk is empty."""
    torch.manual_seed(1)
    query, keys, values = (
        torch.randn(1, 2, 4, 8).to(DEVICE),
        torch.randn(3, 2, 8, 16).to(DEVICE),
        torch.randn(3, 2, 16, 8).to(DEVICE),
    )
    hidden = torch.zeros(1, 1, 4, 16, dtype=torch.bool, device=DEVICE)
    hidden[:, :, 0] = True
    space = Workspace(torch.device(DEVICE))
    padded = natural(partial(query, keys, values, Rule(0.5), space, "t", [Mask(2, hidden)]))
    states = States(*(tensor[:, :, :4] for tensor in padded))
    scores = torch.einsum("xhrd,nhdc->nhrc", query, keys) * 0.5
    torch.testing.assert_close(states.m[:2], scores[:2].amax(-1))
    torch.testing.assert_close(states.l[:2], (scores - scores.amax(-1, True)).exp().sum(-1)[:2])
    assert states.l[2, :, 0].eq(0).all() and states.o[2, :, 0].eq(0).all()
    left = (states.o[0, 0], states.m[0, 0], states.l[0, 0])
    right = (states.o[1, 0], states.m[1, 0], states.l[1, 0])
    o, m, l = reference.merge(left, right)
    both = scores[:2, 0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(m + l.log(), both.logsumexp(-1))
    torch.testing.assert_close(o / l[:, None], both.softmax(-1) @ values[:2, 0].flatten(0, 1))


@pytest.mark.skipif(DEVICE != "cpu", reason="only CPUs promise rows that do not depend on others")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 4, 8), (4, 8, 16), (1, 16, 16), (2, 64, 64)], ids=str)
def test_a_small_product_gives_the_bits_of_a_large_one(shape, dtype):
    """torch has other code for products of few elements; a lone chunk must not meet it."""
    torch.manual_seed(0)
    heads, dim, chunk = shape
    query = torch.randn(1, heads, 9, dim).to(dtype)
    keys = torch.randn(300, heads, dim, chunk).to(dtype)
    values = torch.randn(300, heads, chunk, dim).to(dtype)
    space, other = Workspace(torch.device("cpu")), Workspace(torch.device("cpu"))
    whole = partial(query, keys, values, Rule(dim**-0.5), space, "t")
    for rows in (1, 2, 5, 9):
        for at in range(300):
            one = (query[:, :, :rows], keys[at : at + 1], values[at : at + 1])
            alone = partial(*one, Rule(dim**-0.5), other, "t")
            for ours, theirs in zip(alone, whole, strict=True):
                assert torch.equal(ours[0, :, :rows], theirs[at, :, :rows])


@pytest.mark.skipif(DEVICE != "cpu", reason="only CPUs promise rows that do not depend on others")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", range(1, 40))
def test_a_row_may_stand_anywhere(columns, dtype):
    """What `keeps_rows` says of a width, or the promise is not claimed for it."""
    if not keeps_rows(columns, dtype):
        assert dtype == torch.float32
        return
    torch.manual_seed(columns)
    space = Workspace(torch.device("cpu"))
    for dim in (8, 20, 64):
        query = torch.randn(1, 2, 13, dim).to(dtype)
        keys, values = torch.randn(5, 2, dim, columns), torch.randn(5, 2, columns, dim)
        others = (keys.to(dtype), values.to(dtype), Rule(dim**-0.5), space)
        whole = [part.clone() for part in partial(query, *others, "t")]
        for shift in (1, 2, 3, 6):
            moved = partial(query.roll(shift, 2), *others, "t")
            for ours, theirs in zip(moved, whole, strict=True):
                assert torch.equal(ours[:, :, :13].roll(-shift, 2), theirs[:, :, :13])


def test_merging_needs_no_order_of_calls_to_be_right():
    """Huge and tiny scores: no overflow, and weights that vanish vanish."""
    space = Workspace(torch.device(DEVICE))
    query = torch.full((1, 1, 4, 4), 40.0, device=DEVICE)
    keys = torch.stack(
        [torch.full((1, 4, 8), scale, device=DEVICE) for scale in (-40.0, 40.0, 0.0)]
    )
    values = torch.arange(3.0, device=DEVICE).view(3, 1, 1, 1).expand(3, 1, 8, 4).contiguous()
    states = partial(query, keys, values, Rule(1.0), space, "t")
    maximum = states.m.amax(0)[:, :4]
    total = Total.zeros(1, 4, 4, like=query)
    fold(total, states, maximum, space)
    assert finish(total).eq(1).all()


@given(st.integers(1, 10**7), st.integers(1, 64))
def test_padding_gives_every_thread_whole_blocks(elements, threads):
    size = padded_size(elements, threads)
    shares = max(1, min(threads, math.ceil(size / 32768)))
    assert size >= elements and size % (shares * 64) == 0
    assert size - elements < 64 * threads * 2
