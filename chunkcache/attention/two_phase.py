"""Two-phase attention of a decoding step, and attention of a prefill, over chunks.

Phase 1 attends to each run of shared chunks with all rows that share it, in one batched product.
Phase 2 attends to all private tails, of whatever lengths, in one more. Both leave partial states;
they are merged in the order of position (see `partial`). After ChunkAttention (Ye et al., 2024,
arXiv:2402.15220); grouped query heads are folded into rows.
"""

from __future__ import annotations

from collections.abc import Sequence as Blocks
from typing import NamedTuple

import torch

from chunkcache.attention.partial import (
    States,
    Total,
    finish,
    fixed_point,
    fold,
    partial,
    weigh,
    weights,
)
from chunkcache.attention.plan import PrefillPlan, StepPlan
from chunkcache.attention.workspace import Workspace


class Block(NamedTuple):
    """Chunks that a prefill sees: keys `[n, heads, dim, chunk]`, values `[n, heads, chunk, dim]`."""

    keys: torch.Tensor
    values: torch.Tensor


def attend_step(
    query: torch.Tensor,
    shared: Blocks[Block],
    tails: Block,
    plan: StepPlan,
    scaling: float,
    space: Workspace,
    ordered: bool = True,
) -> torch.Tensor:
    """One new token of each row against the shared chunks and the tails.

    Args:
        query: `[rows, query_heads, 1, dim]`.
        shared: the chunks of `plan.groups`, one block each.
        tails: all arena chunks in use, the new tokens already in them.
        ordered: merge in the order of position, as exactness needs.

    Returns:
        `[rows, 1, query_heads, value_dim]` in the query's type.
    """
    rows, query_heads, _, dim = query.shape
    heads = tails.keys.shape[1]
    folded = query_heads // heads
    by_head = query.reshape(rows, heads, folded, dim).transpose(0, 1)  # [heads, rows, folded, dim]
    maximum = query.new_full((heads, rows, folded), -torch.inf, dtype=torch.float32)
    parts = []
    for number, (group, block) in enumerate(zip(plan.groups, shared, strict=True)):
        index = plan.index(group.rows)
        states = _shared_states(by_head, index, block, scaling, space, f"g{number}")
        _raise_to(maximum, index, states.m.amax(0)[:, : len(group.rows) * folded])
        parts.append((index, states))
    last = _tail_states(by_head, tails, plan, scaling, space)
    for ids, index in plan.levels:
        m = last.m if ids is None else last.m.index_select(0, ids)
        _raise_to(maximum, index, m[:, :, :folded].transpose(0, 1))
    value_dim = tails.values.shape[-1]
    total = Total.zeros(heads, rows, folded, value_dim, like=query)
    for index, states in parts:
        _fold_shared(total, index, states, maximum, space, ordered)
    _fold_tails(total, last, maximum, plan, space)
    out = finish(total).transpose(0, 1).reshape(rows, 1, query_heads, value_dim)
    return out.to(query.dtype)


def _shared_states(
    by_head: torch.Tensor,
    index: torch.Tensor | None,
    block: Block,
    scaling: float,
    space: Workspace,
    name: str,
) -> States:
    rows = (by_head if index is None else by_head.index_select(1, index)).flatten(1, 2)
    return partial(rows.unsqueeze(0), block.keys, block.values, scaling, space, name)


def _tail_states(
    by_head: torch.Tensor, tails: Block, plan: StepPlan, scaling: float, space: Workspace
) -> States:
    own = by_head.index_select(1, plan.owner).transpose(0, 1)  # [chunks, heads, folded, dim]
    return partial(own, tails.keys, tails.values, scaling, space, "tail", plan.hidden)


def _raise_to(maximum: torch.Tensor, index: torch.Tensor | None, m: torch.Tensor) -> None:
    """maximum[:, index] = max(maximum[:, index], m) for m `[heads, rows, folded]` in any row shape."""
    if index is None:
        torch.maximum(maximum, m.reshape(maximum.shape), out=maximum)
    else:
        chosen = maximum.index_select(1, index)
        maximum.index_copy_(1, index, torch.maximum(chosen, m.reshape(chosen.shape)))


def _fold_shared(
    total: Total,
    index: torch.Tensor | None,
    states: States,
    maximum: torch.Tensor,
    space: Workspace,
    ordered: bool,
) -> None:
    own, top = total, maximum
    if index is not None:
        own = Total(total.o.index_select(1, index), total.l.index_select(1, index))
        top = maximum.index_select(1, index)
    flat = Total(own.o.flatten(1, 2), own.l.flatten(1, 2))
    fold(flat, states, top.flatten(1, 2), space, ordered)
    if index is not None:
        total.o.index_copy_(1, index, own.o)
        total.l.index_copy_(1, index, own.l)


def _fold_tails(
    total: Total, states: States, maximum: torch.Tensor, plan: StepPlan, space: Workspace
) -> None:
    folded = maximum.shape[2]
    top = maximum.index_select(1, plan.owner).transpose(0, 1)  # [chunks, heads, folded]
    missing = states.m.shape[2] - folded
    scale = weights(states, torch.nn.functional.pad(top, (0, missing)), space)
    l = fixed_point(states.l * scale)[:, :, :folded].transpose(0, 1)
    o = weigh(states.o, scale, space)[:, :, :folded].transpose(0, 1)
    for ids, index in plan.levels:
        new = o if ids is None else o.index_select(1, ids)
        new_l = l if ids is None else l.index_select(1, ids)
        if index is None:
            total.o.add_(new)
            total.l.add_(new_l)
        else:
            total.o.index_add_(1, index, new)
            total.l.index_add_(1, index, new_l)


def attend_prefill(
    query: torch.Tensor,
    shared: Blocks[Block],
    tail: Block,
    plan: PrefillPlan,
    scaling: float,
    space: Workspace,
    ordered: bool = True,
) -> torch.Tensor:
    """The new tokens of one sequence against its shared chunks, its tail and each other (causal).

    Args:
        query: `[1, query_heads, tokens, dim]`.
        shared: blocks of whole chunks for the positions before `plan.tail_start`, in order.
        tail: chunks from that position on, the new tokens already in them.

    Returns:
        `[1, tokens, query_heads, value_dim]` in the query's type.

    Queries are taken in blocks, so memory stays at a few MiB; by row invariance the block size does
    not show in the result.
    """
    _, query_heads, tokens, dim = query.shape
    heads = tail.keys.shape[1]
    folded = query_heads // heads
    rows = query.reshape(heads, folded, tokens, dim).transpose(1, 2)  # [heads, tokens, folded, dim]
    out = query.new_empty((tokens, query_heads, tail.values.shape[-1]))
    for step in plan.steps(query_heads, heads, space):
        blocks = [*shared, Block(tail.keys[: step.seen], tail.values[: step.seen])]
        new = rows[:, step.begin : step.end]
        total = _attend_rows(new.flatten(1, 2), blocks, step.hidden, scaling, space, ordered)
        part = finish(total).view(heads, step.end - step.begin, folded, -1).transpose(0, 1)
        out[step.begin : step.end] = part.flatten(1, 2)
    return out.unsqueeze(0)


def _attend_rows(
    rows: torch.Tensor,
    blocks: list[Block],
    hidden: torch.Tensor,
    scaling: float,
    space: Workspace,
    ordered: bool,
) -> Total:
    """Rows `[heads, rows, dim]` against all blocks; the mask is the last block's."""
    count = rows.shape[1]
    query = rows.unsqueeze(0)
    parts = []
    for number, block in enumerate(blocks):
        mask = hidden if number == len(blocks) - 1 else None
        name = f"b{number}"
        parts.append(partial(query, block.keys, block.values, scaling, space, name, mask))
    maximum = torch.stack([states.m.amax(0) for states in parts]).amax(0)
    maximum = maximum[:, :count]
    total = Total.zeros(*maximum.shape, blocks[0].values.shape[-1], like=maximum)
    for states in parts:
        fold(total, states, maximum, space, ordered)
    return total
