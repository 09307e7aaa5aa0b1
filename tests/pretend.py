"""A device with memory of its own and products that are not row-invariant, pretended on the CPU.

`CHUNKCACHE_DEVICE=pretend` runs the tests on it. It shows on any machine what breaks first on an
accelerator: tensors of two devices in one operation, and the fallback to borders being relied on. A
product of M rows is summed in as many parts as M decides, as matrix libraries of GPUs choose another
kernel for another shape. It says nothing about speed or about such a library's true last bits.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
aten = torch.ops.aten
# Operations that take tensors of two devices on CUDA too.
_MIXED = {
    aten.copy_,
    aten._to_copy,
    aten.index,
    aten.index_put_,
    aten.index_put,
    aten._index_put_impl_,
}
_PRODUCTS = {aten.mm, aten.bmm, aten.addmm}
waits: Counter[str] = Counter()  # operations for which the host waits for the device


class PretendTensor(torch.Tensor):
    """A tensor that says it is on the device and keeps its values in `inner` on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendTensor:
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"pretend({self.inner!r})"

    def data_ptr(self) -> int:
        """Where the values lie."""
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        """The host waits for the values."""
        waits["tolist"] += 1
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the values; what it returns is on the device, unless it was sent away."""
    packet, target = func.overloadpacket, kwargs.get("device")
    if packet is aten._fused_sdp_choice:
        return 0  # plain products, the only way that every device has
    tensors: list[torch.Tensor] = []
    inner = [_values(arg, tensors) for arg in args]
    named = {name: _values(arg, tensors) for name, arg in kwargs.items()}
    ours = {id(t.inner): t for t in tensors if isinstance(t, PretendTensor)}
    if packet not in _MIXED and any(t.dim() for t in tensors if not isinstance(t, PretendTensor)):
        raise RuntimeError(f"{func} got tensors of two devices")
    _count(packet, tensors, args, target)
    if target is not None:
        named["device"] = torch.device("cpu")
    out = (_product if packet in _PRODUCTS else func)(*inner, **named)
    assert all(t.shape == t.inner.shape for t in ours.values()), f"{func} resized its argument"
    if packet is aten.copy_ and not isinstance(args[0], PretendTensor):
        return args[0]
    stays = target is None or torch.device(target).type == NAME
    return _wrapped(out, ours) if stays else out


def _values(arg: Any, seen: list[torch.Tensor]) -> Any:
    """An argument with values in place of pretended tensors; `seen` gets all its tensors."""
    if isinstance(arg, torch.Tensor):
        seen.append(arg)
        return arg.inner if isinstance(arg, PretendTensor) else arg
    return [_values(item, seen) for item in arg] if isinstance(arg, list | tuple) else arg


def _wrapped(out: Any, ours: dict[int, PretendTensor]) -> Any:
    """A result on the device; what was written in place is the tensor that was given."""
    if isinstance(out, torch.Tensor):
        return ours[id(out)] if id(out) in ours else PretendTensor(out)
    return type(out)(_wrapped(item, ours) for item in out) if isinstance(out, list | tuple) else out


def _count(packet: Any, tensors: list[torch.Tensor], args: Any, target: Any) -> None:
    moved = target is not None and tensors and tensors[0].device.type != torch.device(target).type
    copied = packet is aten.copy_ and args[0].device != args[1].device
    if moved or copied or packet in {aten._local_scalar_dense, aten.equal, aten.nonzero}:
        waits[str(packet)] += 1


def _product(*args: Any, out: Any = None, alpha: float = 1, beta: float = 1) -> torch.Tensor:
    """mm, bmm or addmm, summed in parts; how many depends on the number of rows."""
    *first, left, right = args
    if left.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        left, right = _tf32(left), _tf32(right)
    parts = 1 + left.shape[-2] % 3
    cuts = zip(
        left.float().tensor_split(parts, -1), right.float().tensor_split(parts, -2), strict=True
    )
    total = sum(a @ b for a, b in cuts)
    if first:
        total = total * alpha + first[0] * beta
    return total.to(left.dtype) if out is None else out.copy_(total)


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to the ten bits behind the point that tensor cores read."""
    return (x.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


def register() -> None:
    """Makes the device known to torch; once in a process."""
    _setup_privateuseone_for_python_backend(NAME)
    torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    _ALL.fallback(_below, "PrivateUse1")
    _ALL.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _NAMED:
        func = getattr(getattr(aten, name.partition(".")[0]), name.partition(".")[2] or "default")
        _ATEN.impl(name, partial(_below, func), "PrivateUse1")


def _below(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What reaches the backend itself: operations without a tensor, and those inside `torch.tensor`."""
    return _run(func, args, kwargs)


# Composite operations that would resize a tensor, and those a fallback is not called for.
_NAMED = ("arange", "arange.start", "arange.start_step", "copy_", "index.Tensor")
_ALL = torch.library.Library("_", "IMPL")
_ATEN = torch.library.Library("aten", "IMPL")
