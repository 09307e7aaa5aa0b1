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
_LOWEST = -1e30  # in place of -inf, so that a chunk without a visible key gives 0 and not NaN


class States(NamedTuple):
    """Partials of n chunks: o `[n, heads, rows, value_dim]`, m and l `[n, heads, rows]`, m in log2."""

    o: torch.Tensor
    m: torch.Tensor
    l: torch.Tensor  # noqa: E741 - the literature's name


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
        space: scratch memory; the states live in it until `name` is used again.
        hidden: True where a key must not be seen, broadcast to `[h, heads, rows, chunk]` for the
            last h chunks.

    Returns:
        States of n chunks; a row that sees no key of a chunk has m = -1e30 and o = l = 0.

    Products run in the type of the keys; scores, sums and the merge in float32.
    """
    n, heads, dim, chunk = keys.shape
    rows = query.shape[2]
    many, _ = space.get(name + ".q", (n, heads, rows, dim), keys.dtype)
    scores, flat = space.get(name + ".s", (n, heads, rows, chunk))
    if keys.dtype == torch.float32:
        many.copy_(query * (scaling * LOG2E))
        _product(many, keys, scores)
    else:
        many.copy_(query)
        raw, _ = space.get(name + ".r", (n, heads, rows, chunk), keys.dtype)
        _product(many, keys, raw)
        scores.copy_(raw).mul_(scaling * LOG2E)
    if hidden is not None:
        scores[n - hidden.shape[0] :].masked_fill_(hidden, -math.inf)
    m = scores.amax(-1).clamp_min_(_LOWEST)
    scores.sub_(m.unsqueeze(-1))
    flat.exp2_()
    l = scores.sum(-1)  # noqa: E741
    weights = scores
    if keys.dtype != torch.float32:
        weights, _ = space.get(name + ".r", (n, heads, rows, chunk), keys.dtype)
        weights.copy_(scores)
    o, _ = space.get(name + ".o", (n, heads, rows, values.shape[-1]), keys.dtype)
    _product(weights, values, o)
    return States(o, m, l)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.view(-1, *out.shape[2:]))


def fold(
    total: torch.Tensor, states: States, maximum: torch.Tensor, space: Workspace, name: str
) -> None:
    """Adds states to `total`, chunk by chunk in order.

    Args:
        total: `[heads, rows, value_dim + 1]` float32: numerator, and denominator in the last column.
        maximum: `[heads, rows]`: the rows' maxima over everything they see, in log2.
    """
    weighted = weigh(states, maximum, space, name)
    for chunk in weighted:
        total += chunk


def weigh(
    states: States, maximum: torch.Tensor, space: Workspace, name: str
) -> torch.Tensor:
    """States brought to a common maximum: `[n, heads, rows, value_dim + 1]`, l in the last column.

    `maximum` is broadcast against `[n, heads, rows]`.
    """
    o, m, l = states  # noqa: E741
    scale, flat = space.get(name + ".w", tuple(m.shape))
    torch.sub(m, maximum, out=scale)
    flat.exp2_()
    weighted, _ = space.get(name + ".t", (*o.shape[:-1], o.shape[-1] + 1))
    torch.mul(o, scale.unsqueeze(-1), out=weighted[..., :-1])
    torch.mul(l, scale, out=weighted[..., -1])
    return weighted


def finish(total: torch.Tensor) -> torch.Tensor:
    """Attention output `[..., value_dim]` from `[..., value_dim + 1]`."""
    return total[..., :-1] / total[..., -1:]
