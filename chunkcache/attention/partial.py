"""Partial attention over chunks, and the merge of partials: the arithmetic that exactness rests on.

A row is one query of one head. For every chunk the partial of a row is `(o, m, l)`: the maximum m of
its scores, l = sum(2^(s - m)) and o = sum(2^(s - m) v) over the chunk's keys. Partials are merged
under the row's overall maximum: o in position order, l in fixed point, where order does not matter.
So what a row gets depends on the row and its keys alone: not on which chunks lay together in memory,
which node they belong to, who shares them, or how many rows were computed at once. This needs of the
library only that a row of a batched product does not depend on the number of rows and batches. On
CPUs that is true from four rows up, if the product is not a small one, for which torch has other
code (`padded_rows`), nor an odd narrow one (`keeps_rows`); the probe checks it for each model and
machine.

**The logarithm's base is 2** inside: scores are scaled by log2(e), because exp2 is three times
faster than exp on CPUs (0.28 against 0.82 ns per element). `natural()` converts a state for others.

Rejected: torch's flash operator (rows change with their number); one product per 512 keys (no
faster than 64, and a tail or a match that ends inside it would have to be padded or copied); fused
multiply-add in the merge (used by some code paths and not by others: tails came out differently).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from chunkcache.attention.rule import Rule
from chunkcache.attention.workspace import Workspace

LOG2E = math.log2(math.e)
_ROWS = 4  # batched products give a row the same bits from four rows up
_SMALL = 400  # multiplications of an entry up to which torch has other code for float32
_SMALL_HALF = 16**3  # and of all entries for half precision
_UNIT = 2.0**40  # of fixed-point numbers
_LOWEST = -1e30  # in place of -inf, so that a chunk without a visible key gives 0 and not NaN


class States(NamedTuple):
    """Partials of n chunks: o `[n, heads, rows, value_dim]`, m and l `[n, heads, rows]`, m in log2."""

    o: torch.Tensor
    m: torch.Tensor
    l: torch.Tensor


class Mask(NamedTuple):
    """What must not be seen of chunks `begin` .. `begin + h`: True where a key is hidden.

    `hidden` is broadcast to `[h, heads, rows, chunk]`.
    """

    begin: int
    hidden: torch.Tensor


class Total(NamedTuple):
    """Merged states: o `[..., rows, value_dim]` float32, and l `[..., rows]` in fixed point."""

    o: torch.Tensor
    l: torch.Tensor

    @staticmethod
    def zeros(*shape: int, like: torch.Tensor) -> Total:
        """Nothing merged yet; `shape` is that of o."""
        o = torch.zeros(shape, dtype=torch.float32, device=like.device)
        return Total(o, torch.zeros(shape[:-1], dtype=torch.int64, device=like.device))


def natural(states: States) -> States:
    """The same states with m in natural logarithm."""
    return States(states.o, states.m * math.log(2), states.l)


def padded_rows(rows: int, cells: int, dtype: torch.dtype) -> int:
    """Rows that a product with a matrix of so many cells is formed with.

    Enough that torch's choice of code does not depend on the number of rows and batches, however
    few: that choice depends on rows x cells x batches in half precision, on rows x cells in float32.

    >>> padded_rows(5, 64 * 64, torch.float32), padded_rows(1, 16 * 8, torch.bfloat16)
    (8, 36)
    """
    small = _SMALL_HALF if dtype.itemsize == 2 else _SMALL
    return -(-max(rows, small // cells + 1) // _ROWS) * _ROWS


def keeps_rows(columns: int, dtype: torch.dtype) -> bool:
    """Whether a row of a batched product so wide has the same bits wherever it stands.

    MKL's float32 products of up to 7 and of 9 to 11 columns treat the rows of a group differently
    (8 and 12 to 130 were tried and do not).
    """
    return dtype.itemsize == 2 or columns == 8 or columns >= 12


def partial(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rule: Rule,
    space: Workspace,
    name: str,
    masks: Sequence[Mask] = (),
) -> States:
    """States of every row with every chunk.

    Args:
        query: `[n, heads, rows, dim]`, or `[1, heads, rows, dim]` if all chunks meet the same rows.
        keys: `[n, heads, dim, chunk]`; values: `[n, heads, chunk, value_dim]`, of a latent layer a
            view of the keys.
        rule: its scaling and softcap; which keys are hidden, the masks say.
        space: scratch memory; the states live in it, under `name`, until it is used again.

    Returns:
        States of n chunks, padded to `padded_rows`; a row that sees no key of a chunk has m = -1e30
        and o = l = 0.

    Products run in the type of the keys; scores, sums and the merge in float32.
    """
    n, heads, dim, chunk = keys.shape
    asked = query.shape[2]
    rows = padded_rows(asked, chunk * min(dim, values.shape[-1]), keys.dtype)
    o, _ = space.get(name + ".o", (n, heads, rows, values.shape[-1]), keys.dtype)
    m, _ = space.get(name + ".m", (n, heads, rows))
    l, _ = space.get(name + ".l", (n, heads, rows))
    # Scaled before the product: unscaled scores overflow float16.
    inner = rule.scaling * LOG2E if rule.softcap is None else rule.scaling / rule.softcap
    query = (query.float() * inner).to(keys.dtype)
    if rows > asked:
        query = torch.nn.functional.pad(query, (0, 0, 0, rows - asked))
    size = min(n, max(1, space.block // (heads * rows * chunk)))
    repeated = len(query) == 1
    if repeated and size > 1:
        many, _ = space.get("query", (size, *query.shape[1:]), keys.dtype)
        query = many.copy_(query)
    for begin in range(0, n, size):
        end = min(n, begin + size)
        block = slice(begin, end)
        scores = _scores(query[: end - begin] if repeated else query[block], keys[block], space)
        if rule.softcap is not None:
            scores[1].tanh_().mul_(rule.softcap * LOG2E)
        _hide(scores[0][:, :, :asked], begin, masks)
        _reduce(scores, values[block], o[block], m[block], l[block], space)
    return States(o, m, l)


def _hide(scores: torch.Tensor, begin: int, masks: Sequence[Mask]) -> None:
    """Applies masks to scores of the chunks from `begin` on."""
    end = begin + len(scores)
    for first, hidden in masks:
        start, stop = max(begin, first), min(end, first + len(hidden))
        if start < stop:
            visible = scores[start - begin : stop - begin]
            visible.masked_fill_(hidden[start - first : stop - first], -math.inf)


def _scores(
    query: torch.Tensor, keys: torch.Tensor, space: Workspace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of a block in float32 and log2, and the padded buffer under them."""
    n, heads, _, chunk = keys.shape
    rows = query.shape[2]
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


def sink_scores(rule: Rule, heads: int, like: torch.Tensor) -> torch.Tensor | None:
    """Scores of the sinks in log2, `[heads, folded]` float32, within what states can hold; or None."""
    if rule.sinks is None:
        return None
    sinks = rule.sinks.detach().to(like.device, torch.float32).view(heads, -1)
    return (sinks * LOG2E).clamp(_LOWEST, -_LOWEST)


def fold_sinks(
    total: Total, sinks: torch.Tensor | None, maximum: torch.Tensor, space: Workspace
) -> None:
    """Adds sinks to denominators: `sinks` is broadcast to the rows' maxima, which are not lower."""
    if sinks is not None:
        weight, flat = space.get("scale", tuple(maximum.shape))
        torch.sub(sinks, maximum, out=weight)
        flat.exp2_()
        total.l.add_(fixed_point(weight))


def fold(
    total: Total,
    states: States,
    maximum: torch.Tensor,
    space: Workspace,
    ordered: bool = True,
) -> None:
    """Adds states to `total`: chunk by chunk in order, or in whatever order is fastest.

    Args:
        total: may have fewer rows than the states, whose last rows are then padding.
        maximum: `[heads, rows]`: the rows' maxima over everything they see, in log2.
    """
    rows = total.o.shape[1]
    missing = states.o.shape[2] - rows
    scale = weights(states, torch.nn.functional.pad(maximum, (0, missing)), space)
    total.l.add_(fixed_point(states.l * scale).sum(0)[:, :rows])
    size = max(1, space.block // states.o[0].numel())
    for begin in range(0, len(states.o), size):
        block = slice(begin, begin + size)
        weighted = weigh(states.o[block], scale[block], space)[:, :, :rows]
        for chunk in weighted if ordered else [weighted.sum(0)]:
            total.o.add_(chunk)


def weigh(o: torch.Tensor, scale: torch.Tensor, space: Workspace) -> torch.Tensor:
    """o `[n, heads, rows, value_dim]` times its weights, in float32; it lives until the next call.

    Multiplied and added in two roundings, not one: fused code would not be used everywhere.
    """
    weighted, _ = space.get("weighted", tuple(o.shape))
    if o.dtype == torch.float32:
        return torch.mul(o, scale.unsqueeze(-1), out=weighted)
    return weighted.copy_(o).mul_(scale.unsqueeze(-1))


def weights(states: States, maximum: torch.Tensor, space: Workspace) -> torch.Tensor:
    """What brings states to a common maximum: `[n, heads, rows]`; `maximum` is broadcast to that."""
    scale, flat = space.get("scale", tuple(states.m.shape))
    torch.sub(states.m, maximum, out=scale)
    flat.exp2_()
    return scale


def fixed_point(x: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 to 2^22 in units of 2^-40, as integers: their sums do not depend on order."""
    return (x * _UNIT).to(torch.int64)


def finish(total: Total) -> torch.Tensor:
    """Attention output, `[..., value_dim]` float32."""
    return total.o / (total.l.float() / _UNIT).unsqueeze(-1)
