"""Packing of token ids and common prefixes."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.errors import ChunkcacheError
from chunkcache.tree import InvalidTokensError, common_prefix, pack, unpack

ids = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 2), max_size=40)


class Tensor:
    """What a torch tensor on this machine looks like."""

    def __init__(self, values) -> None:
        self.values = np.array(values)

    def __array__(self, dtype=None, copy=None):
        return self.values

    def tolist(self):
        return self.values.tolist()


class FarTensor(Tensor):
    """What a torch tensor on another device looks like."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert device tensor to numpy")


@given(ids)
def test_every_form_of_the_same_ids_packs_alike(tokens) -> None:
    data = b"".join(token.to_bytes(4, "big") for token in tokens)
    whole = np.array(tokens, np.int64)
    forms = [tokens, tuple(tokens), array("L", tokens), whole, whole.astype(np.uint32)]
    forms += [whole.astype(">u4"), np.repeat(whole, 2)[::2], Tensor(whole), FarTensor(whole)]
    for form in forms:
        assert pack(form) == data
    assert unpack(data).tolist() == tokens


def test_range_and_small_dtypes() -> None:
    assert pack(range(3)) == pack([0, 1, 2]) == pack(np.arange(3, dtype=np.int8))
    assert pack([np.int64(1), np.uint8(2)]) == pack([1, 2])
    assert pack([]) == pack(np.array([], np.int32)) == b""


def test_long_prompts_do_not_need_the_scratch() -> None:
    long = np.arange(300_000)
    assert np.array_equal(unpack(pack(long)), long)


@pytest.mark.parametrize(
    "bad",
    [
        [-1], [2**32], [1.0], [None], ["a"], [1, True], [False], (0, True), np.array([-1]),
        np.array([2**32]), np.array([2**63], np.uint64), np.array([1.0]), np.array([True]),
        np.array([[1, 2]]), np.array(1), "ab", b"ab", bytearray(4), memoryview(b"abcd"), 7, None,
        {1: 2}, array("d", [1.0]), FarTensor([[1]]), Tensor([1.5]), [[1]], [10**30],
    ],
)  # fmt: skip
def test_bad_ids_are_refused(bad) -> None:
    with pytest.raises(InvalidTokensError) as caught:
        pack(bad)
    assert isinstance(caught.value, ChunkcacheError) and isinstance(caught.value, ValueError)


def test_bounds_are_allowed() -> None:
    assert unpack(pack([0, 2**32 - 1])).tolist() == [0, 2**32 - 1]


@given(ids, ids, ids, st.integers(0, 5), st.integers(0, 5), st.integers(0, 60))
def test_common_prefix(head, a, b, a_start, b_start, limit) -> None:
    left, right = [*a[:a_start], *head, *a], [*b[:b_start], *head, *b]
    a_start, b_start = min(a_start, len(a)), min(b_start, len(b))
    expected = 0
    for x, y in zip(left[a_start:], right[b_start:], strict=False):
        if x != y or expected == limit:
            break
        expected += 1
    first, second = pack(left), pack(right)
    assert common_prefix(first, a_start, second, b_start, limit) == expected
    views = memoryview(first), memoryview(second)
    assert common_prefix(views[0], a_start, views[1], b_start, limit) == expected


@pytest.mark.parametrize("at", [0, 1, 15, 16, 17, 47, 48, 1_000, 9_999, 10_000])
def test_common_prefix_finds_every_place(at: int) -> None:
    a = np.arange(10_000)
    b = a.copy()
    b[at:] += 1
    assert common_prefix(pack(a), 0, pack(b), 0, 10_000) == at
