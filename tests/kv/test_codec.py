"""Values of chunks and snapshots: what goes in comes out, and anything else is noticed."""

from __future__ import annotations

import json
import random
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.errors import CorruptValueError, StoreDownError
from chunkcache.kv import ChunkLayout, LayerShape
from chunkcache.kv.codec import (
    Identity,
    decode_chunk,
    decode_state,
    encode_chunk,
    encode_state,
    identities,
    inspect,
)
from chunkcache.kv.packing import bytes_of, pack_tensor, unpack_tensor
from chunkcache.kv.rows import RowShape
from chunkcache.stores import Key
from chunkcache.tree import pack

CPU = torch.device("cpu")
NAMESPACE = bytes(range(32))
LAYERS = {
    "attention": (LayerShape(2, 6, 4), LayerShape(1, 3, 3)),
    "latent": (LayerShape(1, 10, 8, latent=True), LayerShape(2, 4, 4)),
    "rows": (RowShape(4, 5, torch.int64), RowShape(2, 3, torch.float32), LayerShape(1, 2, 2)),
    "nothing": (),
}
TYPES = [torch.float32, torch.bfloat16, torch.float16]
PACKS = [False, True]


def layout_of(kind: str, dtype: torch.dtype = torch.float32) -> ChunkLayout:
    return ChunkLayout(LAYERS[kind], 4, dtype, CPU)


def filled(layout: ChunkLayout, seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """A chunk of random bits, strange numbers among them."""
    generator = torch.Generator().manual_seed(seed)
    chunk = [tuple(part[:, 0] for part in kv) for kv in layout.allocate_alike(1)]
    for tensor in (part for layer in chunk for part in layer):
        bits = torch.randint(0, 256, (tensor.nbytes,), dtype=torch.uint8, generator=generator)
        tensor.copy_(bits.view(tensor.dtype).view(tensor.shape))
    return chunk


def bits(layers: list[tuple[torch.Tensor, ...]]) -> list[list[bytes]]:
    return [
        [part.contiguous().view(torch.uint8).numpy().tobytes() for part in layer]
        for layer in layers
    ]


def identity(tokens: int = 8, first: int = 1, namespace: bytes = NAMESPACE) -> Identity:
    return identities(namespace, pack(list(range(7, 7 + tokens))), 4)[first]


@pytest.mark.parametrize("pack_", PACKS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_chunks_come_back_bit_for_bit(kind: str, dtype: torch.dtype, pack_: bool) -> None:
    layout = layout_of(kind, dtype)
    chunk = filled(layout)
    value = encode_chunk(identity(), chunk, layout, pack_)
    found = decode_chunk(value, identity(), layout)
    assert bits(found) == bits(chunk)
    assert [[p.shape for p in layer] for layer in found] == [
        [p.shape for p in layer] for layer in chunk
    ]
    assert encode_chunk(identity(), chunk, layout, pack_) == value


@pytest.mark.parametrize("pack_", PACKS)
def test_states_come_back_bit_for_bit(pack_: bool) -> None:
    tensors = (torch.randn(2, 3), torch.zeros(0, 4), torch.tensor(5), torch.tensor([True, False]))
    plain = [["a", 1, None], {"b": 0.1}]
    value = encode_state(identity().snapshot(), tensors, plain, pack_)
    found, more = decode_state(value, identity().snapshot())
    assert more == plain and all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))
    assert [one.dtype for one in found] == [one.dtype for one in tensors]


@pytest.mark.parametrize("pack_", PACKS)
def test_every_bit_may_flip(pack_: bool) -> None:
    """None gives other numbers than were written, and almost all are noticed."""
    layout = layout_of("attention")
    chunk = filled(layout)
    value = encode_chunk(identity(), chunk, layout, pack_)
    unnoticed = 0
    for at in range(len(value)):
        for bit in range(8):
            flipped = bytearray(value)
            flipped[at] ^= 1 << bit
            try:
                found = decode_chunk(bytes(flipped), identity(), layout)
            except CorruptValueError:
                continue
            assert bits(found) == bits(chunk), (at, bit)
            unnoticed += 1
    assert unnoticed <= 64  # spaces that fill the header up


def test_every_end_may_be_cut_off() -> None:
    layout = layout_of("attention")
    value = encode_chunk(identity(), filled(layout), layout)
    for end in range(len(value)):
        with pytest.raises(CorruptValueError):
            decode_chunk(value[:end], identity(), layout)
    with pytest.raises(CorruptValueError):
        decode_chunk(value + b"x", identity(), layout)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_noise_is_no_value(noise: bytes) -> None:
    for text in (noise, len(noise).to_bytes(8, "little") + noise):
        with pytest.raises(CorruptValueError):
            decode_chunk(text, identity(), layout_of("attention"))


OTHERS = {
    "namespace": identity(namespace=bytes(32)),
    "first chunk": identity(first=0),
    "position": identity()._replace(start=8),
    "parent": identity()._replace(parent="ab"),
    "key": identity()._replace(key=Key("ab", "cd")),
    "tokens": identity()._replace(data=pack([1, 2, 3, 4])),
    "snapshot": identity().snapshot(),
}


@pytest.mark.parametrize("what", OTHERS)
def test_values_of_something_else_are_refused(what: str) -> None:
    layout = layout_of("attention")
    value = encode_chunk(identity(), filled(layout), layout)
    with pytest.raises(CorruptValueError):
        decode_chunk(value, OTHERS[what], layout)


@pytest.mark.parametrize(
    "other",
    [
        layout_of("latent"),
        layout_of("attention", torch.bfloat16),
        ChunkLayout(LAYERS["attention"][:1], 4, torch.float32, CPU),
        ChunkLayout((*LAYERS["attention"], LayerShape(1, 2, 2)), 4, torch.float32, CPU),
        ChunkLayout((LayerShape(2, 4, 6), LayerShape(1, 3, 3)), 4, torch.float32, CPU),
    ],
    ids=["latent", "type", "fewer", "more", "shape"],
)
def test_values_of_other_layouts_are_refused(other: ChunkLayout) -> None:
    layout = layout_of("attention")
    value = encode_chunk(identity(), filled(layout), layout)
    with pytest.raises(CorruptValueError):
        decode_chunk(value, identity(), other)


def test_other_formats_are_refused() -> None:
    """A later version would change its number and seal its metadata as this one does."""
    from chunkcache.kv import codec

    layout = layout_of("attention")
    value = encode_chunk(identity(), filled(layout), layout)
    size = int.from_bytes(value[:8], "little")
    header = json.loads(value[8 : 8 + size])
    facts = json.loads(header["__metadata__"]["chunkcache"]) | {"format": 2}
    facts.pop("seal")
    facts["seal"] = codec._seal(facts)
    header["__metadata__"]["chunkcache"] = codec._text(facts)
    text = json.dumps(header).encode()
    other = len(text).to_bytes(8, "little") + text + value[8 + size :]
    with pytest.raises(CorruptValueError, match="format 2"):
        decode_chunk(other, identity(), layout)


@given(st.lists(st.integers(0, 3), max_size=14), st.lists(st.integers(0, 3), max_size=14))
def test_names_are_equal_exactly_for_equal_prefixes(one: list[int], other: list[int]) -> None:
    left, right = (identities(NAMESPACE, pack(tokens), 4) for tokens in (one, other))
    assert len(left) == len(one) // 4
    for a, b in zip(left, right, strict=False):
        same = one[: a.start + 4] == other[: a.start + 4]
        assert (a.key == b.key) == same
    assert identities(NAMESPACE, pack(one), 4, 2) == left[2:]
    assert {a.key for a in left}.isdisjoint(b.key for b in identities(bytes(32), pack(one), 4))


def test_compression_leaves_what_cannot_be_compressed_little_larger() -> None:
    random_ = random.Random(0)
    noise = torch.tensor([random_.getrandbits(8) for _ in range(4096)], dtype=torch.uint8)
    plain, packed = (len(encode_state(identity(), (noise,), None, pack_)) for pack_ in PACKS)
    assert packed < plain + 200
    zeros = torch.zeros(4096)
    assert len(encode_state(identity(), (zeros,), None, True)) < 1200


@pytest.mark.parametrize("pack_", PACKS)
@pytest.mark.parametrize("first", [0, 1])
def test_a_value_says_what_it_is_of(first: int, pack_: bool) -> None:
    layout, one = layout_of("attention"), identity(first=first)
    value = encode_chunk(one, filled(layout), layout, pack_)
    assert inspect(value, one.key) == one
    state = encode_state(one.snapshot(), [torch.ones(3)], {"a": 1}, pack_)
    assert inspect(state, one.snapshot().key) == one.snapshot()
    other = identity(first=1 - first)
    for wrong in (other.key, one.snapshot().key, Key("ab", one.key.name + "00")):
        with pytest.raises(CorruptValueError):
            inspect(value, wrong)


def test_a_flip_of_any_bit_is_found_without_knowing_what_it_is_of() -> None:
    layout, one = layout_of("attention"), identity()
    value = encode_chunk(one, filled(layout), layout)
    for place in range(8 * len(value)):
        damaged = bytearray(value)
        damaged[place // 8] ^= 1 << place % 8
        try:
            assert inspect(bytes(damaged), one.key) == one
            assert bits(decode_chunk(bytes(damaged), one, layout)) == bits(filled(layout))
        except CorruptValueError:
            continue


def test_one_number_of_a_longer_row_is_packed() -> None:
    """torch calls it contiguous with any stride."""
    one = torch.arange(6.0)[2::5]
    assert bytes(bytes_of(one)) == bytes(bytes_of(torch.tensor([2.0])))
    for pack_ in PACKS:
        value = encode_state(identity(), [one], None, pack_)
        assert decode_state(value, identity())[0][0].tolist() == [2.0]


@pytest.mark.parametrize("kind", LAYERS)
def test_the_container_is_that_of_safetensors(kind: str) -> None:
    """Any reader of it finds the tensors, layers that are alike together."""
    layout, one = layout_of(kind), identity()
    chunk = filled(layout)
    found = safetensors.torch.load(encode_chunk(one, chunk, layout))
    assert found.pop("tokens").numpy().tobytes() == one.data
    assert sum(part.nbytes for part in found.values()) == layout.chunk_bytes
    if kind == "latent":
        assert {name: list(part.shape) for name, part in found.items()} == {
            "layers 0-0.0": [1, 1, 4, 10],
            "layers 1-1.0": [1, 2, 4, 4],
            "layers 1-1.1": [1, 2, 4, 4],
        }


def test_what_needs_a_library_that_is_not_there_is_not_damaged(monkeypatch) -> None:
    layout, one = layout_of("attention"), identity()
    value = encode_chunk(one, filled(layout), layout, pack=True)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(StoreDownError, match="zstandard"):
        decode_chunk(value, one, layout)


def patched(value: bytes, change) -> bytes:
    """A value with another header."""
    size = int.from_bytes(value[:8], "little")
    header = json.loads(value[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + value[8 + size :]


@pytest.mark.parametrize(
    "field, strange",
    [
        ("shape", [1, -2, -4, 6]),
        ("shape", [2**40, 2**40, 0]),
        ("shape", ["a"]),
        ("shape", None),
        ("dtype", "F7"),
        ("data_offsets", [0, 2**60]),
        ("data_offsets", [-4, 4]),
        ("data_offsets", [5]),
        ("data_offsets", [0.0, 1.5]),
        ("data_offsets", "ab"),
        ("more", 1),
    ],
)
def test_strange_headers_are_damage(field: str, strange: object) -> None:
    layout, one = layout_of("attention"), identity()
    value = encode_chunk(one, filled(layout), layout)

    def change(header: dict) -> None:
        header["layers 0-0.0"][field] = strange

    with pytest.raises(CorruptValueError):
        decode_chunk(patched(value, change), one, layout)
    for junk in (b"", b"1234567", (2**63).to_bytes(8, "little") + b"{}", b"\2" + bytes(7) + b"[]"):
        with pytest.raises(CorruptValueError):
            decode_chunk(junk, one, layout)
    deep = b"[" * 100_000
    with pytest.raises(CorruptValueError):
        decode_chunk(len(deep).to_bytes(8, "little") + deep, one, layout)


@pytest.mark.parametrize("dtype", ["torch.nothing", "torch.Tensor", ""])
def test_a_packed_type_that_is_none_is_damage(dtype: str) -> None:
    packed = pack_tensor(torch.zeros(3))
    with pytest.raises(ValueError, match="no type"):
        unpack_tensor(packed, dtype, [3])
