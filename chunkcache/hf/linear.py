"""Linear layers of the twin, whose rows have the same bits whatever the other rows are.

A library chooses the code of a product by its shape, so a row's last bits may depend on how many
rows there are, and small numbers of rows are where libraries are slow: in float32, MKL reaches half
of the processor at 64 rows and a tenth at 4. The compiled product (chunkcache/native/linear.h) has one
order of summation for all shapes. It serves the twin's `torch.nn.Linear` in float32, and in bfloat16
on processors that multiply pairs of it but have no matrix unit; all else stays with torch.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from chunkcache.hf.fingerprint import product_type
from chunkcache.native.library import TYPES, VERSION, Library, libraries

_log = logging.getLogger(__name__)
_NEAR = {torch.float32: 1e-3, torch.bfloat16: 1.0}  # for sums of about a thousand products


class RowLinear(torch.nn.Linear):
    """`torch.nn.Linear` for inference: by a compiled module, or by torch where `serving` is None."""

    serving: str | None = None  # its name, since modules cannot be copied

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input `[..., in_features]` times the weights: `[..., out_features]`."""
        name, weight, bias = self.serving, self.weight, self.bias  # another thread may serve() anew
        if name is None or not _fits(input, weight, bias):
            return super().forward(input)
        return _multiply(libraries()[0][name], input, weight, bias)


def _fits(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `multiply` may be handed these; what it may not, torch computes or refuses."""
    return (
        _regular(weight, bias)
        and input.dtype == weight.dtype
        and input.device.type == "cpu"
        and input.shape[-1:] == weight.shape[1:]
        and input.numel() > 0
    )


def _regular(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the compiled product can read these: whole, dense, and of a type it knows."""
    if bias is not None:
        alike = bias.dtype == weight.dtype and bias.device == weight.device
        if not alike or not bias.is_contiguous() or bias.shape != weight.shape[:1]:
            return False
    whole_pairs = weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
    known = weight.dtype == torch.float32 or whole_pairs
    placed = weight.device.type == "cpu" and weight.is_contiguous()
    return known and placed and weight.data_ptr() % 4 == 0


def multiply(
    library: Library, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """input `[..., k]` times weight `[n, k]`, transposed, plus bias `[n]`: `[..., n]`, all of one type.

    O(rows n k); scratch memory of at most 192 KiB per thread. No gradients.

    Raises:
        ValueError: for tensors that the library, which is handed addresses, could not refuse.
    """
    if not _fits(input, weight, bias) or not _knows(library, input.dtype):
        raise ValueError(f"no product of {input.dtype} {tuple(input.shape)} by these weights")
    return _multiply(library, input, weight, bias)


def _multiply(
    library: Library, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    columns, depth = weight.shape
    rows = _whole(input.reshape(-1, depth))
    out = input.new_empty(len(rows), columns)
    size = input.element_size()
    library.linear(
        TYPES[input.dtype],
        1,
        len(rows),
        depth,
        columns,
        (rows.data_ptr(), rows.stride(0) * size, 0),
        (weight.data_ptr(), weight.stride(0) * size, 0),
        False,
        0 if bias is None else bias.data_ptr(),
        (out.data_ptr(), columns * size, 0),
        torch.get_num_threads(),
    )
    return out.view(*input.shape[:-1], columns)


def _knows(library: Library, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and library.pairs())


def _whole(rows: torch.Tensor) -> torch.Tensor:
    """Rows that the library can read: numbers side by side, each row from a multiple of 4 bytes on."""
    size = rows.element_size()
    strides = [stride * size % 4 for stride in rows.stride()[:-1]]
    if rows.stride(-1) == 1 and not any(strides) and rows.data_ptr() % 4 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def multiply_heads(
    library: Library, input: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """input `[rows, heads, k]` times weight `[heads, k, n]`, which may be turned: out `[rows, heads, n]`.

    A row's bits depend on the row and the weights alone, as in `multiply`. Either side of a head's
    weights may lie side by side; they are read where they are. O(rows heads k n).

    Raises:
        ValueError: for tensors that the library, which is handed addresses, could not refuse.
    """
    rows, heads, depth = input.shape
    columns = weight.shape[2]
    size = input.element_size()
    kinds = {(each.dtype, each.device.type) for each in (input, weight, out)}
    known = kinds == {(input.dtype, "cpu")} and _knows(library, input.dtype)
    apart = all(step > 0 for step, count in zip(out.stride(), out.shape, strict=True) if count > 1)
    across = weight.stride(2) == 1
    lines = weight.stride(1 if across else 2)
    starts = (lines * size, weight.stride(0) * size, weight.data_ptr())
    readable = across or (weight.stride(1) == 1 and not any(n % 4 for n in starts))
    if not (
        known
        and weight.shape[:2] == (heads, depth)
        and out.shape == (rows, heads, columns)
        and readable
        and out.stride(2) == 1
        and apart
        and depth * size % 4 == 0
        and input.numel() > 0
    ):
        raise ValueError(f"no product of {input.dtype} {tuple(input.shape)} by these weights")
    input = _whole(input)
    library.linear(
        TYPES[input.dtype],
        heads,
        rows,
        depth,
        columns,
        (input.data_ptr(), input.stride(0) * size, input.stride(1) * size),
        (weight.data_ptr(), lines * size, weight.stride(0) * size),
        across,
        0,
        (out.data_ptr(), out.stride(0) * size, out.stride(1) * size),
        torch.get_num_threads(),
    )
    return out


def serve(twin: torch.nn.Module, compiled: bool = True) -> str:
    """Gives the twin's linear layers the product that is best for them, and says which.

    Layers of other classes (adapters, quantised weights) and with a forward of their own keep it.
    """
    used = set()
    for module in twin.modules():
        if type(module) not in (torch.nn.Linear, RowLinear) or "forward" in module.__dict__:
            continue
        assert isinstance(module, torch.nn.Linear)
        name = _find(module) if compiled else None
        module.__class__ = RowLinear  # hooks, tensors and names stay as they are
        module.__dict__["serving"] = name
        if name:
            used.add(name)
    return f"native {' '.join(sorted(used))} {VERSION}" if used else "torch"


def _find(module: torch.nn.Linear) -> str | None:
    """The compiled module for a layer, if there is one."""
    tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
    plain = all(type(tensor) is torch.nn.Parameter for tensor in tensors)
    if not plain or not _regular(module.weight, module.bias):
        return None
    if module.weight.dtype == torch.float32 and product_type(module.weight.device) != torch.float32:
        return None  # the user gave up precision for speed that we do not have
    return best(module.weight.dtype)


@cache
def best(dtype: torch.dtype) -> str | None:
    """The first compiled module whose product of this type keeps its promise on this machine."""
    for name, library in libraries()[0].items():
        if dtype == torch.float32 or library.pairs():
            if _keeps_promise(library, dtype):
                return name
            _log.warning("linear layers in %s do without %s: it failed its check", dtype, name)
    return None


def _keeps_promise(library: Library, dtype: torch.dtype) -> bool:
    """Whether products are right, and a row's bits the same in any company."""
    generator = torch.Generator().manual_seed(0)
    count, columns, depth = 131, 203, 1112  # no multiples of any tile; several blocks of depth
    numbers = torch.randn(count + columns, depth, generator=generator, device="cpu").to(dtype)
    rows, weight, bias = numbers[:count], numbers[count:], numbers[0, :columns]
    whole = multiply(library, rows, weight, bias)
    expected = rows.double() @ weight.double().T + bias.double()
    near = (whole.double() - expected).abs().max().item() < _NEAR[dtype]
    parts = [(at, size) for size in (1, 4, 7, 64) for at in (0, 5, 67)]
    alone = all(
        torch.equal(multiply(library, rows[at : at + size], weight, bias), whole[at : at + size])
        for at, size in parts
    )
    return near and alone and _heads_agree(library, rows, weight)


def _heads_agree(library: Library, rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether products per head, of weights either way round, have the bits of single products."""
    x, turned = rows.view(len(rows), 2, -1), weight.view(len(weight), 2, -1).permute(1, 2, 0)
    single = [multiply(library, x[:, head], turned[head].T.contiguous(), None) for head in (0, 1)]
    expected = torch.stack(single, 1)
    return all(
        torch.equal(multiply_heads(library, x[:n], one, torch.empty_like(part)), part)
        for one in (turned, turned.contiguous())
        for n in (4, len(x))
        for part in [expected[:n]]
    )
