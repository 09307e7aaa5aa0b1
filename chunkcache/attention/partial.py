"""Partial attention over chunks, and the merge of partials: the arithmetic that exactness rests on.

A row is one query of one head. For every chunk the partial of a row is `(o, m, l)`: the maximum m of
its scores, l = sum(2^(s - m)) and o = sum(2^(s - m) v) over the chunk's keys. Partials are merged
under the row's overall maximum, in position order, by one multiplication and one addition per
number. So what a row gets depends on the row and its keys alone: not on which chunks lay together
in memory, which node they belong to, who shares them, or how many rows were computed at once. This
needs of the library only that a row of a batched product does not depend on the number of rows and
batches (true on CPUs from four rows up; the probe checks it for each model and machine).

**The logarithm's base is 2** inside: scores are scaled by log2(e), because exp2 is three times
faster than exp on CPUs (0.28 against 0.82 ns per element). `natural()` converts a state for others.

Rejected: torch's flash operator (rows change with their number); one product per 512 keys (no
faster than 64, and a tail or a match that ends inside it would have to be padded or copied);
fused multiply-add in the merge (vector and scalar code may round differently).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from chunkcache.attention.workspace import Workspace

LOG2E = math.log2(math.e)
ROW_MULTIPLE = 4  # batched products give a row the same bits from four rows up
_BLOCK = 2**19  # scores worked on at a time: 2 MiB, the second-level caches of two cores
_LOWEST = -1e30  # in place of -inf, so that a chunk without a visible key gives 0 and not NaN


class States(NamedTuple):
    """Partials of n chunks: o `[n, heads, rows, value_dim]`, m and l `[n, heads, rows]`, m in log2."""

    o: torch.Tensor
    m: torch.Tensor
    l: torch.Tensor


def natural(states: States) -> States:
    """The same states with m in natural logarithm."""
    return States(states.o, states.m * math.log(2), states.l)


def padded_rows(rows: int) -> int:
    """Rows a product is formed with."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def partial(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    space: Workspace,
    name: str,
    hidden: torch.Tensor | None = None,
) -> States:
    """States of every row with every chunk.

    Args:
        query: `[n, heads, rows, dim]`, rows a multiple of ROW_MULTIPLE; or `[1, heads, rows, dim]`
            if all chunks meet the same rows.
        keys: `[n, heads, dim, chunk]`; values: `[n, heads, chunk, value_dim]`.
        scaling: of the scores, as transformers passes it.
        space: scratch memory; the states live in it, under `name`, until it is used again.
        hidden: True where a key must not be seen, broadcast to `[h, heads, rows, chunk]` for the
            last h chunks.

    Returns:
        States of n chunks; a row that sees no key of a chunk has m = -1e30 and o = l = 0.

    Products run in the type of the keys; scores, sums and the merge in float32.
    """
    n, heads, _, chunk = keys.shape
    rows = query.shape[2]
    o, _ = space.get(name + ".o", (n, heads, rows, values.shape[-1]), keys.dtype)
    m, _ = space.get(name + ".m", (n, heads, rows))
    l, _ = space.get(name + ".l", (n, heads, rows))
    query = (query.float() * (scaling * LOG2E)).to(
        keys.dtype
    )  # before the product: float16 overflows
    size = max(1, _BLOCK // (heads * rows * chunk))
    seen = n - (0 if hidden is None else hidden.shape[0])
    for begin in range(0, n, size):
        end = min(n, begin + size)
        block = slice(begin, end)
        scores = _scores(query if len(query) == 1 else query[block], keys[block], space)
        if hidden is not None and end > seen:
            first = max(begin, seen)
            scores[0][first - begin :].masked_fill_(hidden[first - seen : end - seen], -math.inf)
        _reduce(scores, values[block], o[block], m[block], l[block], space)
    return States(o, m, l)


def _scores(
    query: torch.Tensor, keys: torch.Tensor, space: Workspace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of a block in float32 and log2, and the padded buffer under them."""
    n, heads, dim, chunk = keys.shape
    rows = query.shape[2]
    if len(query) != n or not query.is_contiguous():
        many, _ = space.get("query", (n, heads, rows, dim), keys.dtype)
        query = many.copy_(query)
    scores, flat = space.get("scores", (n, heads, rows, chunk))
    if keys.dtype == torch.float32:
        _product(query, keys, scores)
    else:
        raw, _ = space.get("raw", (n, heads, rows, chunk), keys.dtype)
        _product(query, keys, raw)
        scores.copy_(raw)
    return scores, flat


def _reduce(
    scores: tuple[torch.Tensor, torch.Tensor],
    values: torch.Tensor,
    o: torch.Tensor,
    m: torch.Tensor,
    l: torch.Tensor,
    space: Workspace,
) -> None:
    """Fills o, m and l of a block; the scores are overwritten."""
    weights, flat = scores
    torch.amax(weights, -1, out=m)
    m.clamp_min_(_LOWEST)
    weights.sub_(m.unsqueeze(-1))
    flat.exp2_()
    torch.sum(weights, -1, out=l)
    if values.dtype != torch.float32:
        narrow, _ = space.get("raw", tuple(weights.shape), values.dtype)
        weights = narrow.copy_(weights)
    _product(weights, values, o)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.flatten(0, 1))


def fold(
    total: torch.Tensor,
    states: States,
    maximum: torch.Tensor,
    space: Workspace,
    ordered: bool = True,
) -> None:
    """Adds states to `total`: chunk by chunk in order, or in whatever order is fastest.

    Args:
        total: `[heads, rows, value_dim + 1]` float32: numerator, and denominator in the last column;
            it may have fewer rows than the states, whose last rows are then padding.
        maximum: `[heads, rows]`: the rows' maxima over everything they see, in log2.
    """
    rows = total.shape[1]
    n, heads, padded, dim = states.o.shape
    if padded != maximum.shape[1]:
        maximum = torch.nn.functional.pad(maximum, (0, padded - maximum.shape[1]))
    size = max(1, _BLOCK // (heads * padded * dim))
    for begin in range(0, n, size):
        block = States(*(part[begin : begin + size] for part in states))
        weighted = weigh(block, maximum, space)[:, :, :rows]
        for chunk in weighted if ordered else [weighted.sum(0)]:
            total += chunk


def weigh(states: States, maximum: torch.Tensor, space: Workspace) -> torch.Tensor:
    """States brought to a common maximum: `[n, heads, rows, value_dim + 1]`, l in the last column.

    `maximum` is broadcast against `[n, heads, rows]`. The result lives until the next call.
    """
    o, m, l = states
    scale, flat = space.get("scale", tuple(m.shape))
    torch.sub(m, maximum, out=scale)
    flat.exp2_()
    weighted, _ = space.get("weighted", (*o.shape[:-1], o.shape[-1] + 1))
    torch.mul(o, scale.unsqueeze(-1), out=weighted[..., :-1])
    torch.mul(l, scale, out=weighted[..., -1])
    return weighted


def finish(total: torch.Tensor) -> torch.Tensor:
    """Attention output `[..., value_dim]` from `[..., value_dim + 1]`."""
    return total[..., :-1] / total[..., -1:]
