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
    fold_sinks,
    partial,
    sink_scores,
    weigh,
    weights,
)
from chunkcache.attention.plan import Part, PrefillPlan, StepPlan, Tails
from chunkcache.attention.rule import Rule
from chunkcache.attention.workspace import Workspace


class Block(NamedTuple):
    """Chunks: keys `[n, heads, dim, chunk]`, values `[n, heads, chunk, value_dim]` or a view of keys."""

    keys: torch.Tensor
    values: torch.Tensor

    def part(self, begin: int, end: int) -> Block:
        """Some of the chunks."""
        return Block(self.keys[begin:end], self.values[begin:end])


def attend_step(
    query: torch.Tensor,
    shared: Blocks[Block],
    tails: Block,
    plan: StepPlan,
    rule: Rule,
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
    view = plan.view(rule, folded)
    maximum = query.new_full((heads, rows, folded), -torch.inf, dtype=torch.float32)
    parts = []
    for part in view.shared:
        members = plan.groups[part.block].rows
        index = plan.index(members)
        states = _shared_states(by_head, index, shared[part.block], part, rule, space)
        _raise_to(maximum, index, states.m.amax(0)[:, : len(members) * folded])
        parts.append((index, states))
    last = _tail_states(by_head, tails, view.tails, rule, space)
    for ids, index in view.tails.levels:
        m = last.m if ids is None else last.m.index_select(0, ids)
        _raise_to(maximum, index, m[:, :, :folded].transpose(0, 1))
    sinks = sink_scores(rule, heads, maximum)
    if sinks is not None:
        sinks = sinks.unsqueeze(1)
        torch.maximum(maximum, sinks, out=maximum)
    value_dim = tails.values.shape[-1]
    total = Total.zeros(heads, rows, folded, value_dim, like=query)
    fold_sinks(total, sinks, maximum, space)
    for index, states in parts:
        _fold_shared(total, index, states, maximum, space, ordered)
    _fold_tails(total, last, maximum, view.tails, space)
    out = finish(total).transpose(0, 1).reshape(rows, 1, query_heads, value_dim)
    return out.to(query.dtype)


def _shared_states(
    by_head: torch.Tensor,
    index: torch.Tensor | None,
    block: Block,
    part: Part,
    rule: Rule,
    space: Workspace,
) -> States:
    rows = (by_head if index is None else by_head.index_select(1, index)).flatten(1, 2)
    seen, name = block.part(part.begin, part.end), f"g{part.block}"
    return partial(rows.unsqueeze(0), *seen, rule, space, name, part.masks)


def _tail_states(
    by_head: torch.Tensor, block: Block, tails: Tails, rule: Rule, space: Workspace
) -> States:
    own = by_head.index_select(1, tails.owner).transpose(0, 1)  # [chunks, heads, folded, dim]
    if tails.chosen is not None:
        block = Block(*(tensor.index_select(0, tails.chosen) for tensor in block))
    return partial(own, *block, rule, space, "tail", [tails.mask])


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
    total: Total, states: States, maximum: torch.Tensor, tails: Tails, space: Workspace
) -> None:
    folded = maximum.shape[2]
    top = maximum.index_select(1, tails.owner).transpose(0, 1)  # [chunks, heads, folded]
    missing = states.m.shape[2] - folded
    scale = weights(states, torch.nn.functional.pad(top, (0, missing)), space)
    l = fixed_point(states.l * scale)[:, :, :folded].transpose(0, 1)
    o = weigh(states.o, scale, space)[:, :, :folded].transpose(0, 1)
    for ids, index in tails.levels:
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
    blocks: Blocks[Block],
    plan: PrefillPlan,
    rule: Rule,
    space: Workspace,
    ordered: bool = True,
) -> torch.Tensor:
    """The new tokens of one sequence against its shared chunks, its tail and each other (causal).

    Args:
        query: `[1, query_heads, tokens, dim]`.
        blocks: of whole chunks, in order of position; the new tokens are in the last already.

    Returns:
        `[1, tokens, query_heads, value_dim]` in the query's type.

    Queries are taken in blocks, so memory stays at a few MiB; by row invariance the block size does
    not show in the result.
    """
    _, query_heads, tokens, dim = query.shape
    heads, value_dim = blocks[-1].keys.shape[1], blocks[-1].values.shape[-1]
    folded = query_heads // heads
    rows = query.reshape(heads, folded, tokens, dim).transpose(1, 2)  # [heads, tokens, folded, dim]
    out = query.new_empty((tokens, query_heads, value_dim))
    sinks = sink_scores(rule, heads, query)
    for step in plan.steps(query_heads, heads, rule, space):
        count = step.end - step.begin
        new = rows[:, step.begin : step.end].flatten(1, 2)
        states = [_part_states(new, blocks, part, rule, space) for part in step.parts]
        repeated = None if sinks is None else sinks.repeat(1, count)
        total = _merge(states, new.shape[1], repeated, space, ordered)
        done = finish(total).view(heads, count, folded, -1).transpose(0, 1)
        out[step.begin : step.end] = done.flatten(1, 2)
    return out.unsqueeze(0)


def _part_states(
    rows: torch.Tensor, blocks: Blocks[Block], part: Part, rule: Rule, space: Workspace
) -> States:
    """States of rows `[heads, rows, dim]` with some chunks of a block."""
    seen, name = blocks[part.block].part(part.begin, part.end), f"b{part.block}"
    return partial(rows.unsqueeze(0), *seen, rule, space, name, part.masks)


def _merge(
    parts: list[States], rows: int, sinks: torch.Tensor | None, space: Workspace, ordered: bool
) -> Total:
    """All states of `rows` rows, and their sinks `[heads, rows]`."""
    maximum = torch.stack([states.m.amax(0) for states in parts]).amax(0)[:, :rows]
    if sinks is not None:
        maximum = torch.maximum(maximum, sinks)
    total = Total.zeros(*maximum.shape, parts[0].o.shape[-1], like=maximum)
    fold_sinks(total, sinks, maximum, space)
    for states in parts:
        fold(total, states, maximum, space, ordered)
    return total
