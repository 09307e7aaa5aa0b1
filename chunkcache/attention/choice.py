"""Which kernel serves a layout on this machine."""

from __future__ import annotations

from functools import partial
from typing import Literal

from chunkcache.attention.kernel import Kernels
from chunkcache.attention.native.kernel import TYPES, NativeKernel
from chunkcache.attention.native.library import libraries
from chunkcache.attention.torch_kernel import TorchKernel
from chunkcache.errors import ConfigError
from chunkcache.kv.layout import ChunkLayout

Wanted = Literal["auto", "native", "torch"]


def choose(layout: ChunkLayout, wanted: Wanted = "auto", ordered: bool = True) -> Kernels:
    """The fastest kernel, or the one that is wanted.

    Args:
        ordered: False lets a kernel merge in whatever order is fastest (mode "fast").

    Raises:
        ConfigError: the native kernel is wanted and cannot serve this layout here.
    """
    reason = _why_not_native(layout)
    if wanted == "native" and reason:
        raise ConfigError(f"kernel is 'native', but {reason}; use 'auto'")
    if wanted == "torch" or reason:
        return partial(TorchKernel, ordered=ordered)
    name, library = next(iter(libraries()[0].items()))
    return partial(NativeKernel, library=library, instructions=name)


def _why_not_native(layout: ChunkLayout) -> str | None:
    if layout.device.type != "cpu":
        return f"it is for CPUs and the model is on {layout.device.type}"
    if layout.dtype not in TYPES:
        return f"it has no code for {layout.dtype}"
    found, missing = libraries()
    if not found:
        return "; ".join(f"{name}: {why}" for name, why in missing.items())
    return None
