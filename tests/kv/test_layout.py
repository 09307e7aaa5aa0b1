"""What layers keep, and the arena over layers of every kind and over none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.attention.batch import Batch
from chunkcache.attention.choice import choose
from chunkcache.kv import Arena, ChunkLayout, LayerShape
from chunkcache.kv.layout import by_layer
from chunkcache.kv.sequence import Sequence
from tests.models import DEVICE

SHAPES = (LayerShape(2, 3, 5), LayerShape(1, 6, 4, latent=True))


def layout_of(*shapes):
    return ChunkLayout(shapes, 4, torch.float32, torch.device(DEVICE))


def parts_of(shape, tokens):
    """Random numbers to store, a tensor `[heads, tokens, width]` per part."""
    widths = [shape.head_dim] if shape.latent else [shape.head_dim, shape.value_dim]
    return [torch.randn(shape.kv_heads, tokens, width).to(DEVICE) for width in widths]


def stored(arena, layer):
    """All tokens of a layer as they were given, a tensor `[heads, tokens, width]` per part."""
    views = arena.layout.layers[layer].by_token(arena.layer(layer))
    return [view.transpose(0, 1).flatten(1, 2) for view in views]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_counted_is_what_is_allocated(shape):
    layout = layout_of(shape, shape)
    held = [tensor for layer in layout.allocate(7) for tensor in layer]
    assert sum(tensor.nbytes for tensor in held) == 7 * layout.chunk_bytes
    assert layout.chunk_bytes == 4 * layout.token_bytes
    assert all(len(tensor) == 7 for tensor in held)


def test_layers_that_are_alike_lie_together():
    one, two = LayerShape(2, 6, 4), LayerShape(1, 3, 3)
    layout = layout_of(one, one, two, one)
    assert layout.alike == (range(0, 2), range(2, 3), range(3, 4))
    together = layout.allocate_alike(5)
    assert [len(parts[0]) for parts in together] == [2, 1, 1]
    layers = by_layer(together)
    outlines = [tuple(part.shape[1:] for part in kv) for kv in map(layout.outline, range(4))]
    assert [tuple(part.shape[1:] for part in kv) for kv in layers] == outlines
    assert all(part.is_contiguous() and len(part) == 5 for kv in layers for part in kv)
    for part in (part for kv in together for part in kv):
        part.zero_()
    layers[1][0].fill_(1)
    sums = [[float(part.sum()) for part in kv] for kv in together]
    assert sums == [[layers[1][0].numel(), 0], [0, 0], [0, 0]]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([0, 1]), st.lists(st.integers(1, 11), min_size=1, max_size=8))
def test_appends_of_any_size_write_the_same_memory(layer, sizes):
    arena, at = Arena(layout_of(*SHAPES)), 0
    parts = parts_of(SHAPES[layer], sum(sizes))
    for size in sizes:
        arena.extend(max(0, -(-(at + size) // 4) - arena.used))
        if size == 1:
            place = (torch.tensor([index], device=DEVICE) for index in divmod(at, 4))
            arena.append_step(layer, *place, *(part[None, :, at] for part in parts))
        else:
            arena.append(layer, at // 4, at % 4, *(part[:, at : at + size] for part in parts))
        at += size
    for found, part in zip(stored(arena, layer), parts, strict=True):
        assert torch.equal(found[:, :at], part) and found[:, at:].eq(0).all()


def test_chunks_are_copied_cleared_and_chosen_whatever_a_layer_keeps():
    layout = layout_of(*SHAPES)
    arena, other = Arena(layout), Arena(layout)
    arena.extend(3)
    other.extend(4)
    for layer, shape in enumerate(SHAPES):
        arena.append(layer, 0, 0, *parts_of(shape, 12))
    other.copy_chunks([arena.layer(layer) for layer in range(2)], 1)
    other.clear_behind(2, 3)
    picked = other.select([2, 0, 3])
    for layer in range(2):
        for before, after in zip(stored(arena, layer), stored(picked, layer), strict=True):
            assert torch.equal(after[:, :3], before[:, 4:7]) and after[:, 3:8].eq(0).all()
            assert torch.equal(after[:, 8:], before[:, 8:])


def test_a_model_may_have_no_layers():
    """Then chunks are tokens alone, and a forward only counts them."""
    layout = layout_of()
    assert (layout.token_bytes, layout.chunk_bytes, layout.allocate(3)) == (0, 0, [])
    rows = [Batch(layout, [Sequence(4)], Arena(layout), choose(layout)(layout)) for _ in range(2)]
    for batch in rows:
        batch.begin([[1, 2, 3, 4, 5]])
        batch.end()
    together = Batch.join(rows).select([1, 0, 1])
    together.begin([[6], [7], [8]])
    together.end()
    assert together.positions == [6, 6, 6] and together.arena.bytes == 0
    assert together.finite_chunks(2) == 2 and together.tail_blocks(0, 0, 2) == []


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_not_finite_is_found_in_every_part(layer):
    layout = layout_of(SHAPES[layer])
    for part in range(len(layout.allocate(0)[0])):
        batch = Batch(layout, [Sequence(4)], Arena(layout), choose(layout)(layout))
        batch.begin([list(range(15))])
        numbers = parts_of(SHAPES[layer], 15)
        numbers[part][-1, 9, -1] = torch.nan
        batch.write(0, *(tensor.unsqueeze(0) for tensor in numbers))
        batch.end()
        assert batch.finite_chunks(0) == 2
