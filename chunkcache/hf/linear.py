"""Linear layers of the twin, whose rows have the same bits whatever the other rows are.

A library chooses the code of a product by its shape, so a row's last bits may depend on how many
rows there are, and small numbers of rows are where libraries are slow: in float32, MKL reaches half
of the processor at 64 rows and a tenth at 4. The compiled product (chunkcache/native/linear.h) has one
order of summation for all shapes. It serves the twin's `torch.nn.Linear` in float32, and in bfloat16
on processors that multiply pairs of it but have no matrix unit; all else stays with torch.
"""

from __future__ import annotations

from functools import cache

import torch

from chunkcache.attention.choice import Wanted
from chunkcache.hf.fingerprint import product_type
from chunkcache.native.library import VERSION, Library, libraries

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_NEAR = {torch.float32: 1e-3, torch.bfloat16: 1.0}  # for sums of about a thousand products


class RowLinear(torch.nn.Linear):
    """`torch.nn.Linear` by the compiled product, or by torch where `library` is None."""

    library: Library | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input `[..., in_features]` times the weights: `[..., out_features]`."""
        if self.library is None or not self._fits(input):
            return super().forward(input)
        return multiply(self.library, input, self.weight, self.bias)

    def _fits(self, input: torch.Tensor) -> bool:
        weight = self.weight
        return (
            input.dtype == weight.dtype
            and weight.dtype in _TYPES
            and input.shape[-1:] == weight.shape[1:]
            and input.numel() > 0
            and input.device.type == weight.device.type == "cpu"
        )


def multiply(
    library: Library, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """input `[..., k]` times weight `[n, k]`, transposed, plus bias `[n]`: `[..., n]`, all of one type.

    O(rows n k); scratch memory of 192 KiB per thread.
    """
    columns, depth = weight.shape
    rows = input.reshape(-1, depth)
    size = input.element_size()
    if rows.stride(1) != 1 or rows.stride(0) * size % 4:
        rows = rows.contiguous()
    out = input.new_empty(len(rows), columns)
    library.linear(
        _TYPES[input.dtype],
        rows.data_ptr(),
        rows.stride(0) * size,
        len(rows),
        depth,
        weight.data_ptr(),
        weight.stride(0) * size,
        columns,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.view(*input.shape[:-1], columns)


def serve(twin: torch.nn.Module, wanted: Wanted) -> str:
    """Gives the twin's linear layers the product that is best for them, and says which.

    Layers of other classes (adapters, quantised weights) and with a forward of their own keep it.
    """
    used = set()
    for module in twin.modules():
        if type(module) not in (torch.nn.Linear, RowLinear) or "forward" in module.__dict__:
            continue
        assert isinstance(module, torch.nn.Linear)
        found = None if wanted == "torch" else _find(module)
        module.__class__ = RowLinear  # hooks, tensors and names stay as they are
        module.__dict__["library"] = found[1] if found else None
        if found:
            used.add(found[0])
    return f"native {' '.join(sorted(used))} {VERSION}" if used else "torch"


def _find(module: torch.nn.Linear) -> tuple[str, Library] | None:
    """The compiled product for a layer, if there is one."""
    weight, bias = module.weight, module.bias
    tensors = [weight] if bias is None else [weight, bias]
    if any(type(tensor) is not torch.nn.Parameter for tensor in tensors):
        return None
    if weight.device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    if bias is not None and bias.dtype != weight.dtype:
        return None
    if weight.dtype == torch.float32:
        exact = product_type(weight.device) == torch.float32  # else the user asked for less
        return sound(torch.float32) if exact else None
    whole_pairs = weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
    return sound(torch.bfloat16) if whole_pairs else None


@cache
def sound(dtype: torch.dtype) -> tuple[str, Library] | None:
    """The best module whose product of this type keeps its promise on this machine, and its name."""
    for name, library in libraries()[0].items():
        if (dtype == torch.float32 or library.pairs()) and _keeps_promise(library, dtype):
            return name, library
    return None


def _keeps_promise(library: Library, dtype: torch.dtype) -> bool:
    """Whether products are right, and a row's bits the same in any company."""
    generator = torch.Generator().manual_seed(0)
    count, columns, depth = 131, 203, 1110  # no multiples of any tile
    numbers = torch.randn(count + columns, depth, generator=generator).to(dtype)
    rows, weight, bias = numbers[:count], numbers[count:], numbers[0, :columns]
    whole = multiply(library, rows, weight, bias)
    expected = rows.double() @ weight.double().T + bias.double()
    near = (whole.double() - expected).abs().max().item() < _NEAR[dtype]
    parts = [(at, size) for size in (1, 4, 7, 64) for at in (0, 5, 67)]
    return near and all(
        torch.equal(multiply(library, rows[at : at + size], weight, bias), whole[at : at + size])
        for at, size in parts
    )
