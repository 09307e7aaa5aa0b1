"""Latent attention in absorbed form: scores and sums over what is stored, not over what it expands to.

A latent key c expands to keys W_k c and values W_v c of many heads. Since q (W_k c) = (q W_k) c and
sum p (W_v c) = W_v (sum p c), the matrices meet the few queries instead of all stored tokens
(DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1.2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from chunkcache.hf.linear import RowLinear, multiply_heads
from chunkcache.kv.layout import LayerShape
from chunkcache.native.library import Library, libraries

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
    """Both halves of the matrix that expands latents: keys `[heads, plain, latent]`, values alike.

    Attributes:
        library: multiplies by them; torch does, if it is None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    library: Library | None = None

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
                whole = plain * child.weight.element_size() % 4 == 0
                serving = child.__dict__.get("serving")  # as the layer's own product, muted or not
                library = libraries()[0][serving] if serving and whole else None
                return Absorbed(both[:, :plain], both[:, plain:], library)
        return None

    def enter(self, query: torch.Tensor) -> torch.Tensor:
        """Queries `[rows, heads, tokens, dim]` as they meet latents: `[rows, heads, tokens, key]`."""
        plain, latent = self.keys.shape[1:]
        rows, heads, tokens, dim = query.shape
        out = query.new_empty(rows, tokens, heads, latent + dim - plain)
        asked = query.transpose(1, 2)
        out[..., latent:] = asked[..., plain:]
        self._multiply(asked[..., :plain], self.keys, out[..., :latent])
        return out.transpose(1, 2)

    def leave(self, out: torch.Tensor) -> torch.Tensor:
        """Sums of latents `[rows, tokens, heads, latent]` as values, `[rows, tokens, heads, dim]`."""
        values = out.new_empty(*out.shape[:3], self.values.shape[1])
        self._multiply(out, self.values.transpose(1, 2), values)
        return values

    def _multiply(self, x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        """x `[rows, tokens, heads, n]` times weights `[heads, n, m]` into out `[rows, tokens, heads, m]`.

        One product per head over all rows and tokens, so that their number decides as in linear layers.
        """
        x, out = x.flatten(0, 1), out.flatten(0, 1)
        if self.library is not None:
            multiply_heads(self.library, x, weights, out)
        elif weights.stride(2) == 1 or x.dtype == torch.float32:
            out.copy_(torch.bmm(x.transpose(0, 1), weights).transpose(0, 1))
        else:
            # oneDNN would lay the matrix out anew on every call: 2.2 ms against 0.5 for 32 heads.
            product = torch.bmm(weights.transpose(1, 2), x.permute(1, 2, 0))
            out.copy_(product.permute(2, 0, 1))
