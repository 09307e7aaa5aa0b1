"""Latent attention in absorbed form: scores and sums over what is stored, not over what it expands to.

A latent key c expands to keys W_k c and values W_v c of many heads. Since q (W_k c) = (q W_k) c and
sum p (W_v c) = W_v (sum p c), the matrices meet the few queries instead of all stored tokens
(DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1.2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from chunkcache.hf.linear import RowLinear
from chunkcache.kv.layout import LayerShape

_FOUND = "_chunkcache_expands_latents"


class Muted(torch.nn.Linear):
    """A layer whose weights are read and whose product nobody needs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Zeros of the right shape."""
        return input.new_zeros(1).expand(*input.shape[:-1], self.out_features)


def mute(twin: torch.nn.Module) -> list[tuple[torch.nn.Module, type]]:
    """Spares the twin the expansion of new latents; gives the layers, and their classes till then."""
    found = [(module, type(module)) for module in twin.modules() if _FOUND in module.__dict__]
    for module, _ in found:
        module.__class__ = Muted
    return found


class Absorbed(NamedTuple):
    """Both halves of the matrix that expands latents: keys `[heads, plain, latent]`, values alike."""

    keys: torch.Tensor
    values: torch.Tensor

    @staticmethod
    def of(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        shape: LayerShape,
    ) -> Absorbed | None:
        """From the module's linear layer of the right shape; None if it has none, or not a plain one.

        Args:
            query, key, value: `[rows, heads, tokens, dim]`, expanded; shape: of what is stored.
        """
        heads, latent = query.shape[1], shape.value_dim
        plain = key.shape[-1] - (shape.head_dim - latent)
        wanted = (heads * (plain + value.shape[-1]), latent)
        for child in module.children():
            if not isinstance(child, torch.nn.Linear) or child.weight.shape != wanted:
                continue
            own = (
                type(child) not in (torch.nn.Linear, RowLinear, Muted)
                or "forward" in child.__dict__
            )
            if not own and child.bias is None:
                child.__dict__[_FOUND] = True
                both = child.weight.detach().view(heads, -1, latent)
                return Absorbed(both[:, :plain], both[:, plain:])
        return None

    def enter(self, query: torch.Tensor) -> torch.Tensor:
        """Queries `[rows, heads, tokens, dim]` as they meet latents: `[rows, heads, tokens, key]`."""
        plain = self.keys.shape[1]
        latent = _by_head(query[..., :plain].transpose(1, 2), self.keys).transpose(1, 2)
        return torch.cat([latent, query[..., plain:]], -1)

    def leave(self, out: torch.Tensor) -> torch.Tensor:
        """Sums of latents `[rows, tokens, heads, latent]` as values, `[rows, tokens, heads, dim]`."""
        if out.dtype == torch.float32:
            return _by_head(out, self.values.transpose(1, 2))
        # oneDNN would lay the matrix out anew on every call: 2.2 ms against 0.5 for 32 heads.
        rows, tokens, heads, _ = out.shape
        product = torch.bmm(self.values, out.flatten(0, 1).permute(1, 2, 0))
        return product.permute(2, 0, 1).reshape(rows, tokens, heads, -1)


def _by_head(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x `[rows, tokens, heads, n]` times weights `[heads, n, m]`: `[rows, tokens, heads, m]`.

    One product per head over all rows and tokens, so that their number decides as in linear layers.
    """
    rows, tokens, heads, width = x.shape
    product = torch.bmm(x.reshape(rows * tokens, heads, width).transpose(0, 1), weights)
    return product.transpose(0, 1).reshape(rows, tokens, heads, -1)
