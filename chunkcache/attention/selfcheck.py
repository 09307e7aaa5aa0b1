"""Does a kernel keep its promise on this machine? Asked once of every compiled module.

Modules are compiled where chunkcache is installed, by whatever compiler is there. The model's own
probe is too short to see all of their code, so this one crosses segments with two small layers: one
plainly and under everything that a rule may say, and a latent one.
"""

from __future__ import annotations

import torch

from chunkcache.attention import reference
from chunkcache.attention.batch import Batch
from chunkcache.attention.kernel import Kernels
from chunkcache.attention.rule import Rule
from chunkcache.kv.arena import Arena
from chunkcache.kv.layout import ChunkLayout, LayerShape
from chunkcache.kv.sequence import Sequence

_TOKENS, _CHUNK, _QUERIES = 1100, 64, 6
_SIZES = [70, 1, 430, 9, 1, 1, 77, 500, 11]  # of pieces
_LAYERS = (LayerShape(2, 24, 24), LayerShape(1, 40, 24, latent=True))
_CHECKED = slice(None, None, 13)  # tokens whose attention is computed plainly
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def keeps_promise(kernels: Kernels, dtype: torch.dtype) -> bool:
    """Whether attention is right, and the same bits in one piece, cut, and token by token."""
    layout = ChunkLayout(_LAYERS, _CHUNK, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    layers = [_Numbers(shape, dtype, generator) for shape in _LAYERS]
    whole = _run(layout, kernels, layers, [_TOKENS])
    cut = _run(layout, kernels, layers, _SIZES)
    expected = torch.cat([layer.expected() for layer in layers])
    near = (whole[:, _CHECKED].float() - expected).abs().max().item() < _TOLERANCE[dtype]
    return near and torch.equal(cut, whole)


class _Numbers:
    """Keys, values and queries of one layer, `[1, heads, tokens, dim]`, and the rules it is asked under."""

    def __init__(self, shape: LayerShape, dtype: torch.dtype, generator: torch.Generator):
        def random(heads: int, dim: int) -> torch.Tensor:
            numbers = torch.randn(heads, _TOKENS, dim, generator=generator, device="cpu")
            return numbers.to(dtype)

        self.query = random(_QUERIES, shape.head_dim)
        keys = random(shape.kv_heads, shape.head_dim)
        self.parts = [keys] if shape.latent else [keys, random(shape.kv_heads, shape.value_dim)]
        self.values = keys[..., : shape.value_dim] if shape.latent else self.parts[1]
        sinks = torch.linspace(-1, 2, _QUERIES, device="cpu")
        scaling = shape.head_dim**-0.5
        self.rules = [Rule(scaling, 333, 800, 2.0, sinks)] + [Rule(scaling)] * (not shape.latent)

    def expected(self) -> torch.Tensor:
        """What the reference gives for some tokens, `[rules, tokens, query_heads * value_dim]`."""
        at = torch.arange(_TOKENS, device="cpu")[_CHECKED]
        query, keys, values = self.query[:, _CHECKED], self.parts[0], self.values
        numbers = query.float(), keys.float(), values.float()
        return torch.stack([reference.attend(*numbers, at, rule) for rule in self.rules]).flatten(2)


def _run(
    layout: ChunkLayout, kernels: Kernels, layers: list[_Numbers], sizes: list[int]
) -> torch.Tensor:
    """Everything that is asked, in pieces: `[layers * rules, tokens, query_heads * value_dim]`."""
    batch = Batch(layout, [Sequence(_CHUNK)], Arena(layout), kernels(layout))
    pieces, at = [], 0
    for size in sizes:
        new = slice(at, at + size)
        batch.begin([[0] * size])
        piece = []
        for number, layer in enumerate(layers):
            batch.write(number, *(part[None, :, new] for part in layer.parts))
            query = layer.query[None, :, new]
            piece += [batch.attend(number, query, rule)[0].flatten(1) for rule in layer.rules]
        batch.end()
        pieces.append(piece)
        at += size
    return torch.stack([torch.cat(parts) for parts in zip(*pieces, strict=True)])
