"""Which kernel serves a layout on this machine."""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import Literal

import torch

from chunkcache.attention.kernel import Kernels
from chunkcache.attention.native import NativeKernel
from chunkcache.attention.selfcheck import keeps_promise
from chunkcache.attention.torch_kernel import TorchKernel
from chunkcache.errors import ConfigError
from chunkcache.kv.layout import ChunkLayout
from chunkcache.native.library import TYPES, libraries

_log = logging.getLogger(__name__)

Wanted = Literal["auto", "native", "torch"]


def choose(layout: ChunkLayout, wanted: Wanted = "auto", ordered: bool = True) -> Kernels:
    """The fastest kernel, or the one that is wanted.

    Args:
        ordered: False lets a kernel merge in whatever order is fastest (mode "fast").

    Raises:
        ConfigError: the native kernel is wanted and cannot serve this layout here.
    """
    found, reason = _native(layout)
    if wanted == "native" and found is None:
        raise ConfigError(f"kernel is 'native', but {reason}; use 'auto'")
    if wanted == "torch" or found is None:
        return partial(TorchKernel, ordered=ordered)
    return found


def _native(layout: ChunkLayout) -> tuple[Kernels | None, str]:
    """The best native kernel for a layout, or why there is none."""
    if layout.device.type != "cpu":
        return None, f"it is for CPUs and the model is on {layout.device.type}"
    if layout.dtype not in TYPES:
        return None, f"it has no code for {layout.dtype}"
    kernels, missing = best(layout.dtype)
    return kernels, "; ".join(f"{name}: {why}" for name, why in missing.items())


@cache
def best(dtype: torch.dtype) -> tuple[Kernels | None, dict[str, str]]:
    """The first native kernel that keeps its promise here, and why better ones do not serve."""
    modules, missing = libraries()
    for name in modules:
        kernels = sound(name, dtype)
        if kernels is not None:
            return kernels, missing
        missing = missing | {name: "it failed its check on this machine"}
    # Answers stay exact, but somebody waits longer for them.
    _log.warning("attention runs in torch; no native kernel serves %s: %s", dtype, missing)
    return None, missing


@cache
def sound(name: str, dtype: torch.dtype) -> Kernels | None:
    """The native kernel of an instruction set, if it keeps its promise on this machine."""
    kernels = partial(NativeKernel, library=libraries()[0][name], instructions=name)
    return kernels if keeps_promise(kernels, dtype) else None
