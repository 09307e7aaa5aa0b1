"""One long sequence, and its attention in one piece, for tests that take it in every other way."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from chunkcache.attention import choice, reference
from chunkcache.attention.batch import Batch
from chunkcache.attention.groups import Gate
from chunkcache.attention.rule import Rule
from chunkcache.attention.torch_kernel import TorchKernel
from chunkcache.kv import Arena, ChunkLayout, LayerShape, Pool
from chunkcache.kv.sequence import Sequence
from chunkcache.native.library import libraries
from tests.models import DEVICE

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}

KERNELS = {"torch": TorchKernel}
if DEVICE == "cpu":
    KERNELS |= {name: choice.sound(name, torch.float32) for name in libraries()[0]}


def agree(ours, theirs):
    """Bit-equal where the rows of a product are invariant, which only CPUs promise."""
    if DEVICE == "cpu":
        return torch.equal(ours, theirs)
    return (ours.double() - theirs.double()).abs().max() < 2 * TOLERANCE[ours.dtype]


class World:
    """One long sequence, its chunks in a pool, and its attention done at once.

    Args:
        wide: values, if not as wide as keys; of a latent layer they are the keys' first numbers.
        rule: other than plain attention.
        scale: of the keys.
    """

    def __init__(
        self,
        heads,
        folded,
        dim,
        chunk,
        length,
        dtype,
        kernel=TorchKernel,
        wide=None,
        latent=False,
        rule=None,
        scale=1.0,
    ):
        wide = wide or dim
        torch.manual_seed(0)
        shape = LayerShape(heads, dim, wide, latent)
        self.layout = ChunkLayout((shape,), chunk, dtype, torch.device(DEVICE))
        self.length, self.chunk, self.latent = length, chunk, latent
        self.kernel = kernel
        self.keys = (scale * torch.randn(heads, length, dim)).to(dtype).to(DEVICE)
        self.values = torch.randn(heads, length, wide).to(dtype).to(DEVICE)
        if latent:
            self.values = self.keys[..., :wide]
        self.query = torch.randn(1, heads * folded, length, dim).to(dtype).to(DEVICE)
        self.rule = rule or Rule(dim**-0.5)
        self.pool = Pool(self.layout, self.layout.chunk_bytes * 1000)
        whole = self.batch([])
        self.full = self.forward(whole, 0, length)
        self.arena = whole.arena

    def expected(self):
        """What plain attention in double precision gives, `[tokens, query_heads, wide]`."""
        at = torch.arange(self.length, device=DEVICE)
        operands = (tensor.double() for tensor in (self.query[0], self.keys, self.values))
        return reference.attend(*operands, at, self.rule)

    def batch(self, runs, gate=None):
        kernel = self.kernel(self.layout)
        return Batch(self.layout, [self.sequence(runs)], Arena(self.layout), kernel, gate)

    def sequence(self, runs):
        tokens = sum(map(len, runs)) * self.chunk
        return Sequence(self.chunk, list(range(tokens)), tuple(runs))

    def runs(self, *lengths):
        """The first chunks of the sequence, in pool runs of these lengths."""
        found, at = [], 0
        for length in lengths:
            run = self.pool.allocate(length)
            for to, source in zip(run.layer(0), self.arena.layer(0), strict=True):
                to.copy_(source[at : at + length])
            found.append(run)
            at += length
        return found

    def write(self, batch, keys, values):
        batch.write(0, *((keys,) if self.latent else (keys, values)))

    def forward(self, batch, begin, end):
        """New tokens begin .. end of a one-row batch."""
        batch.begin([list(range(begin, end))])
        self.write(batch, self.keys[None, :, begin:end], self.values[None, :, begin:end])
        out = batch.attend(0, self.query[:, :, begin:end], self.rule)
        batch.end()
        return out[0]

    def step(self, batch):
        """One token for each row of a batch, at each row's own position."""
        at = batch.positions
        batch.begin([[position] for position in at])
        pick = torch.tensor(at, device=DEVICE)
        new = lambda tensor: tensor[:, pick].transpose(0, 1).unsqueeze(2)  # noqa: E731
        self.write(batch, new(self.keys), new(self.values))
        out = batch.attend(0, new(self.query[0]), self.rule)
        batch.end()
        return at, out[:, 0]


def cut_in_every_way(world, data):
    """Prefills in pieces, shared runs of any lengths, steps in any company: always the bits of one piece."""
    chunk = world.chunk
    # Of the native kernels' segments: two runs end inside one, one at its end.
    segment = max(1, 512 // chunk)
    cuts = ((4,), (1, 3), (2, 1, 1), (3,), (segment,), (segment, 2), (1, segment + 1))
    layouts = [world.runs(*lengths) for lengths in cuts if sum(lengths) * chunk < world.length - 4]
    rows = []
    for _ in range(data.draw(st.integers(1, 6))):
        runs = data.draw(st.sampled_from(layouts))
        runs = runs[: data.draw(st.integers(0, len(runs)))]
        batch = world.batch(runs)
        end = data.draw(st.integers(batch.sequences[0].length, world.length - 4))
        while (at := batch.sequences[0].length) < end:
            size = data.draw(st.integers(1, end - at))
            assert agree(world.forward(batch, at, at + size), world.full[at : at + size])
        rows.append(batch)
    together = Batch.join(rows)
    together.gate = Gate(data.draw(st.booleans()), data.draw(st.integers(2, 3)), 1)
    for _ in range(3):
        at, out = world.step(together)
        assert agree(out, world.full[at])
    together = together.select(data.draw(st.permutations(range(together.rows))))
    at, out = world.step(together)
    assert agree(out, world.full[at])
