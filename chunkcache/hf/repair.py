"""Repairs of forwards that resume wrongly or slowly, made on a twin; the probe says whether they hold.

Mamba-1 (Mamba, FalconMamba, Jamba, Zamba): a forward of several tokens starts its selective scan from
zero, whatever state the cache holds; only single tokens go on from it. The scan is a function of the
module, so the twin's mixers get a forward with another one in its place, which starts from the state.

Mamba-2 (Nemotron-H, Zamba 2, Bamba, ...): scans keep their steps within the model's limits, the update by
a single token does not. generate() runs prompts in one piece and the rest by single tokens, so here
single tokens of a prompt keep the limits and generated ones do not.

Nothing of transformers is changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.nn import functional
from transformers.cache_utils import Cache

from chunkcache.hf.running import adds_prompt

_SCAN = "mamba_selective_scan"
_UPDATE = "mamba2_selective_state_update"
_NO_LIMITS = (0.0, float("inf"))
_BLOCK = 64  # tokens of which all states are held at once


def mend(twin: torch.nn.Module, cut: int) -> None:
    """All repairs; `cut` is how many tokens forwards of a prefill take."""
    resume_scans(twin)
    limit_steps(twin)
    shorten_scans(twin, cut)


def resume_scans(twin: torch.nn.Module) -> int:
    """Lets the scans of a twin start from the cached state; returns how many mixers were changed."""
    count = 0
    for module in twin.modules():
        forward = inspect.unwrap(type(module).forward)
        if isinstance(forward, FunctionType) and _SCAN in forward.__code__.co_names:
            module.__dict__["forward"] = MethodType(_resuming(forward), module)
            count += 1
    return count


def limit_steps(twin: torch.nn.Module) -> int:
    """Lets single tokens of a prompt keep the limits of scans; returns how many mixers were changed."""
    count = 0
    for module in twin.modules():
        forward = inspect.unwrap(type(module).forward)
        limits = getattr(module, "time_step_limit", None)
        known = isinstance(forward, FunctionType) and _UPDATE in forward.__code__.co_names
        if known and limits is not None and tuple(limits) != _NO_LIMITS:
            update = _Update(module, forward.__globals__[_UPDATE], *limits)
            module.__dict__["forward"] = MethodType(_with(forward, _UPDATE, update), module)
            count += 1
    return count


def shorten_scans(twin: torch.nn.Module, tokens: int) -> int:
    """Lets Mamba-2's scans take no more than `tokens` at once; returns how many mixers were changed.

    Their sums run over blocks of fixed length, to which a forward is padded: 64 tokens cost as much
    as 256 otherwise.
    """
    count = 0
    for module in twin.modules():
        size = getattr(module, "chunk_size", None)
        if isinstance(size, int) and size > tokens and hasattr(module, "A_log"):
            module.chunk_size = tokens  # type: ignore[assignment]
            count += 1
    return count


def _resuming(forward: FunctionType) -> Callable[..., Any]:
    """The forward of a mixer, with a scan of its own."""

    def resumed(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = next((a for a in (*args, *kwargs.values()) if isinstance(a, Cache)), None)
        state = None if cache is None else _state(cache.layers[self.layer_idx])
        run = _with(forward, _SCAN, _Scan(state))
        return run(self, hidden_states, *args, **kwargs)

    return resumed


def _with(forward: FunctionType, name: str, other: Callable[..., Any]) -> FunctionType:
    """A function that finds another one by a global name, and is the same otherwise."""
    own = {**forward.__globals__, name: other}
    run = FunctionType(
        forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__
    )
    run.__kwdefaults__ = forward.__kwdefaults__
    return run


def _state(layer: Any) -> torch.Tensor | None:
    """What a scan starts from, if the layer holds anything."""
    found: torch.Tensor | None = layer.recurrent_states[0] if layer.has_previous_state[0] else None
    return found


class _Update:
    """A mixer's update by one token, with steps within its limits while prompts are run."""

    def __init__(
        self, module: torch.nn.Module, update: Callable[..., Any], least: float, most: float
    ):
        self.module = module
        self.update = update
        self.limits = least, most

    def __call__(
        self,
        state: torch.Tensor,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        *args: Any,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As the update does; `dt` is what limits are for, once bias and softplus are done."""
        if adds_prompt(self.module):
            dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
            dt = functional.softplus(dt) if dt_softplus else dt
            dt = torch.clamp(dt, *self.limits)
            dt_bias, dt_softplus = None, False
        return self.update(
            state, hidden_states, dt, *args, dt_bias=dt_bias, dt_softplus=dt_softplus, **kwargs
        )


class _Scan:
    """Selective scans of one forward, one after another for mixers with several heads.

    Args:
        state: `[rows, inner, state]`, or `[rows, heads, inner, state]`; None for zeros.
    """

    def __init__(self, state: torch.Tensor | None):
        self.states: Iterator[torch.Tensor | None] = iter([None])
        if state is not None:
            self.states = iter(state.unbind(1) if state.dim() == 4 else [state])

    def __call__(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        """y_t = C_t h_t + D u_t with h_t = exp(A dt_t) h_(t-1) + dt_t B_t u_t, gated by silu(z).

        hidden_states (u), dt, z `[rows, inner, tokens]`; A `[inner, state]`; B, C `[rows, state,
        tokens]`; D, delta_bias `[inner]`. Gives y `[rows, inner, tokens]`, and the last h.
        After Gu and Dao, 2023 (arXiv:2312.00752). Memory of a block of tokens at a time.
        """
        if delta_bias is not None:
            dt = dt + delta_bias.to(dt.dtype)[..., None]
        if delta_softplus:
            dt = functional.softplus(dt)
        given = next(self.states, None)
        state = hidden_states.new_zeros(*hidden_states.shape[:2], A.shape[-1])
        state = state if given is None else given.to(state.dtype).clone()
        outputs = []
        for at in range(0, hidden_states.shape[2], _BLOCK):
            part = slice(at, at + _BLOCK)
            u, step = hidden_states[:, :, part, None].float(), dt[:, :, part, None]
            decay = torch.exp(A[None, :, None] * step)
            fresh = step * B[:, None, :, part].transpose(2, 3).float() * u
            states = []
            for token in range(u.shape[2]):
                state = decay[:, :, token] * state + fresh[:, :, token]
                states.append(state)
            stacked = torch.stack(states, 1).to(hidden_states.dtype)  # [rows, tokens, inner, state]
            outputs.append(
                torch.matmul(stacked, C[:, :, part].transpose(1, 2).unsqueeze(-1))[..., 0]
            )
        y = torch.cat(outputs, 1).transpose(1, 2)
        if D is not None:
            y = y + hidden_states * D[None, :, None]
        if z is not None:
            y = y * functional.silu(z)
        return (y, state) if return_last_state else y
