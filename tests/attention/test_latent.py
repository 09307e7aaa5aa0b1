"""Latent layers: values are the keys' first numbers, and are stored nowhere else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.attention.batch import Batch
from chunkcache.attention.groups import Gate
from chunkcache.attention.partial import keeps_rows, partial
from chunkcache.attention.rule import Rule
from chunkcache.attention.workspace import Workspace
from chunkcache.kv import LayerShape
from tests.attention.world import KERNELS, TOLERANCE, World, agree, cut_in_every_way
from tests.models import DEVICE, TYPES

# KV heads, query heads each, dim, chunk; width of values
SHAPES = [
    ((1, 1, 40, 16), 32),
    ((1, 4, 40, 64), 32),
    ((1, 16, 576, 64), 512),
    ((1, 70, 40, 32), 32),
    ((2, 3, 24, 16), 24),
]
ODD = [((1, 5, 21, 10), 13), ((1, 2, 9, 5), 8), ((1, 3, 40, 48), 33)]


def world_of(shape, length, dtype, kernel, rule=None):
    sizes, wide = shape
    rule = rule or Rule(sizes[2] ** -0.5)
    return World(*sizes, length, dtype, kernel, wide, latent=True, rule=rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES + ODD, ids=str)
def test_the_reference_agrees(shape, dtype, kernel):
    world = world_of(shape, 3 * shape[0][3] + 5, dtype, kernel)
    assert len(world.arena.layer(0)) == 1
    error = (world.full.double() - world.expected()).abs().max()
    assert error < 3 * TOLERANCE[dtype], "sums over 576 numbers"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES + ODD, ids=str)
@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_cut_no_company_no_layout_shows(name, shape, dtype, data):
    sizes, _ = shape
    sinks = torch.linspace(-2, 2, sizes[0] * sizes[1]).to(DEVICE)
    rules = [None, Rule(0.2, window=sizes[3] + 3), Rule(0.2, span=90, softcap=3.0, sinks=sinks)]
    length = data.draw(st.sampled_from([5 * sizes[3], 512 + sizes[3]])) + 7
    rule = data.draw(st.sampled_from(rules))
    world = world_of(shape, length, dtype, KERNELS[name], rule)
    if not world.kernel(world.layout).keeps_rows:
        assert name == "torch" and dtype == torch.float32 and shape in ODD
        return
    cut_in_every_way(world, data)


def test_many_rows_of_many_heads(kernel):
    """More than fit in a tile, and query heads of one row in several tiles."""
    world = world_of(((1, 130, 72, 16), 64), 90, torch.float32, kernel)
    rows = [world.batch(world.runs(3)) for _ in range(5)]
    for row, end in zip(rows[1:], (49, 64, 65, 86), strict=True):
        world.forward(row, 48, end)
    together = Batch.join(rows)
    together.gate = Gate(rows=2, tokens=16)
    for _ in range(3):
        at, out = world.step(together)
        assert agree(out, world.full[at])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_show(threads, kernel):
    shape = ((1, 64, 40, 16), 32)
    before, full = torch.get_num_threads(), world_of(shape, 70, torch.bfloat16, kernel).full
    try:
        torch.set_num_threads(threads)
        world = world_of(shape, 70, torch.bfloat16, kernel)
        assert torch.equal(world.full, full)
        assert torch.equal(world.forward(world.batch(world.runs(2)), 32, 33), full[32:33])
    finally:
        torch.set_num_threads(before)


def test_values_wider_than_keys_are_refused():
    with pytest.raises(ValueError, match="latent values of 41 in keys of 40"):
        LayerShape(1, 40, 41, latent=True)


@pytest.mark.skipif(DEVICE != "cpu", reason="only CPUs promise rows that do not depend on others")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wide", [*range(1, 24), 31, 32, 33, 48, 64, 100, 128, 256, 512])
def test_a_row_may_stand_anywhere(wide, dtype):
    """Products with transposed values take other code; `keeps_rows` must be right of them too."""
    if not keeps_rows(wide, dtype):
        return
    torch.manual_seed(wide)
    space, other = Workspace(torch.device("cpu")), Workspace(torch.device("cpu"))
    for chunk in (8, 16, 20, 64):
        query = torch.randn(1, 1, 21, wide + 8).to(dtype)
        keys = torch.randn(7, 1, wide + 8, chunk).to(dtype)
        values = keys[:, :, :wide].transpose(2, 3)
        whole = partial(query, keys, values, Rule(0.3), space, "t")
        for shift in (1, 2, 3, 6):
            moved = partial(query.roll(shift, 2), keys, values, Rule(0.3), other, "t")
            for ours, theirs in zip(moved, whole, strict=True):
                assert torch.equal(ours[:, :, :21].roll(-shift, 2), theirs[:, :, :21])
        for rows in (1, 2, 5, 9, 16):
            for at in range(7):
                one = keys[at : at + 1], values[at : at + 1]
                alone = partial(query[:, :, :rows], *one, Rule(0.3), other, "t")
                for ours, theirs in zip(alone, whole, strict=True):
                    assert torch.equal(ours[0, :, :rows], theirs[at, :, :rows])
