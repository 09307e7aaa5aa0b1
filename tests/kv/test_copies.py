"""Copies by compiled code are those of torch, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.kv.copies import copy_all
from chunkcache.kv.packing import bytes_of
from chunkcache.native.library import libraries

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]
LIBRARIES = libraries()[0]
SIDES = st.one_of(st.integers(1, 40), st.sampled_from([64, 128]))


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(bytes_of(tensor))


@pytest.mark.parametrize("name", LIBRARIES)
@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    turned=st.booleans(),
    counts=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    sides=st.tuples(SIDES, SIDES),
    odd=st.booleans(),
)
def test_every_number_gets_to_its_place(
    name: str,
    dtype: torch.dtype,
    turned: bool,
    counts: tuple[int, int, int],
    sides: tuple[int, int],
    odd: bool,
) -> None:
    """Chunks of a slab, before and behind which nothing is written."""
    chunks, layers, heads = counts
    slab = filled((layers, chunks + 2, heads, *sides), dtype, 1)
    before = slab.clone()
    there = [slab[:, 1 + number] for number in range(chunks)]
    wire = (layers, heads, *(reversed(sides) if turned else sides))
    here = [filled(wire, dtype, 2 + number) for number in range(chunks)]
    here = [part.transpose(2, 3) if turned else part for part in here]
    if odd:  # one of them lies otherwise
        here[0] = here[0].repeat_interleave(2, dim=-1)[..., ::2]
    copy_all(there, here, LIBRARIES[name])
    assert [bits(part) for part in there] == [bits(part) for part in here]
    for end in (0, chunks + 1):
        assert bits(slab[:, end]) == bits(before[:, end])


def test_without_compiled_code_torch_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkcache.kv.copies.libraries", lambda: ({}, {}))
    here = filled((2, 3, 5, 7), torch.float32, 0)
    there = torch.empty(2, 3, 7, 5)
    copy_all([there], [here.transpose(2, 3)])
    assert bits(there) == bits(here.transpose(2, 3))


def test_tensors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError):
        copy_all([torch.zeros(2, 3, 4)], [torch.zeros(2, 3, 5)])
