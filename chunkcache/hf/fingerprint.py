"""The namespace: a digest of everything besides tokens that KV depends on, and a watch for changes.

Weights count by content, not by name: two checkpoints under one name share nothing. In-place changes
are noticed before every request: autograd's version counters see all of torch's own in-place
operations, and a sample of values sees most that go around them (`tensor.data`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from operator import is_
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version

from chunkcache import __version__
from chunkcache.errors import ModelChangedError
from chunkcache.hf.plain import modules_of
from chunkcache.hf.settings import HOLDERS, PLAIN, VOLATILE, freeze
from chunkcache.hf.tensors import kind, parts, raw, tensors_of

_CAPTURING = "transformers.utils.output_capturing"  # its hooks only look on, if at all
_PROCESSOR = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
_SWITCHES = ("MKL_", "ONEDNN_", "DNNL_", "ATEN_", "CUBLAS_", "NVIDIA_TF32", "TORCH_ALLOW_TF32")
_SAMPLES = 16  # values watched per tensor


def digest_weights(model: PreTrainedModel) -> bytes:
    """32 bytes over names, shapes, types and contents of all tensors. O(bytes); 0.4 s per GiB and core."""
    whole = [*model.named_parameters(), *model.named_buffers()]
    total = hashlib.blake2b(digest_size=32)
    for name, tensor in whole:
        total.update(f"{name} {kind(tensor)} ".encode())
    with ThreadPoolExecutor() as workers:  # hashing releases the interpreter lock
        for part in workers.map(_digest_tensor, tensors_of(model)):
            total.update(part)
    return total.digest()


def _digest_tensor(item: tuple[str, torch.Tensor]) -> bytes:
    name, tensor = item
    digest = hashlib.blake2b(f"{name} {kind(tensor)}".encode(), digest_size=32)
    digest.update(raw(tensor).numpy().data)
    return digest.digest()


def arithmetic(device: torch.device) -> dict[str, object]:
    """What decides the bits of a product besides its operands, as it is set now.

    Switches of precision are read through torch's newer names: once those were used, the older ones
    (`allow_tf32`, `get_float32_matmul_precision`) raise, while the newer follow both.
    """
    backends: Any = torch.backends
    cuda = backends.cuda.matmul
    on_cuda = device.type == "cuda"
    cpu = backends.cpu.get_cpu_capability()
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if on_cuda else cpu,
        "machine": _machine(),
        "torch": torch.__version__,
        "transformers": transformers_version,
        "threads": torch.get_num_threads(),
        "precision": [
            _precision(cuda),
            _precision(backends.mkldnn.matmul),
            backends.cudnn.conv.fp32_precision,
        ],
        "short sums": [
            cuda.allow_bf16_reduced_precision_reduction,
            cuda.allow_fp16_reduced_precision_reduction,
            cuda.allow_fp16_accumulation,
        ],
        "onednn": backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@cache
def _machine() -> str:
    """A digest of what libraries choose their code by: processor, builds, switches of the environment.

    Two machines share a store only if all of that is the same: their libraries may add in another order.
    """
    facts = [platform.machine(), platform.processor(), torch.__config__.show()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().split("\n\n")[0].splitlines()  # of the first core
        facts += [line for line in lines if line.startswith(_PROCESSOR)]
    facts += [f"{key}={os.environ[key]}" for key in sorted(os.environ) if key.startswith(_SWITCHES)]
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=8).hexdigest()


def product_type(device: torch.device) -> torch.dtype:
    """The type to which products of float32 round their operands, or one as rough."""
    backends: Any = torch.backends
    matmul = backends.mkldnn.matmul if device.type == "cpu" else backends.cuda.matmul
    shorter = {"tf32": torch.float16, "bf16": torch.bfloat16}
    return shorter.get(_precision(matmul), torch.float32)


def _precision(matmul: Any) -> str:
    """As set for a backend's products; what nobody set ("none") is full precision."""
    value: str = matmul.fp32_precision
    return "ieee" if value == "none" else value


def namespace(
    model: PreTrainedModel, weights: bytes, settings: Mapping[str, object], tenant: str
) -> bytes:
    """The 32-byte name of the tree whose chunks this model may read.

    Args:
        settings: what else decides bits: chunk size, mode, row multiple, border, what computes
            attention and linear layers.
    """
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "architectures", "torch_dtype"):
        config.pop(volatile, None)
    facts = {
        "config": config,
        "settings": settings,
        "arithmetic": arithmetic(model.device),
        "chunkcache": __version__,  # what another version stored may be other numbers
        "tenant": tenant,
    }
    text = json.dumps(facts, sort_keys=True, default=str).encode()
    return hashlib.blake2b(weights + text, digest_size=32).digest()


class Tensors:
    """Notices that tensors of a model are no longer where and what they were when it was made."""

    def __init__(self, model: PreTrainedModel):
        self._tensors = [tensor for _, tensor in tensors_of(model)]
        self._places = self._where()
        self._views = [_sample(tensor) for tensor in self._tensors]
        self._values = self._read()

    def same(self) -> bool:
        """Whether they are as they were."""
        if self._where() != self._places:
            return False
        return all(map(_same_bits, self._read(), self._values))

    def _read(self) -> list[torch.Tensor]:
        by_type: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for view in self._views:
            by_type.setdefault((view.dtype, view.device), []).append(view)
        return [torch.cat(views) for views in by_type.values()]

    def _where(self) -> list[tuple[object, ...]]:
        return [(tensor.data_ptr(), tensor.dtype, _version(tensor)) for tensor in self._tensors]


class Watch:
    """Notices that a model is no longer what it was when the watch was made.

    `changed()` is true after an in-place change of any watched value or version counter.

    Raises:
        ModelChangedError: (from `changed`) tensors were replaced, moved or re-typed, or the
            configuration, a plain attribute, a hook or a forward of a module is another.

    Args:
        twin: shares its tensors; switched: modules whose settings may change (see adapters.py).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        twin: PreTrainedModel,
        switched: Iterable[torch.nn.Module] = (),
    ):
        self._model = model
        self._config = copy.deepcopy(model.config)
        free = set(map(id, switched))
        self._originals = list(modules_of(model))
        pairs = zip(self._originals, twin.modules(), strict=True)
        self._modules = [_Module(module, twin, id(module) in free) for module, twin in pairs]
        self._tensors = Tensors(model)

    def changed(self) -> bool:
        """Whether weights changed in place. A few microseconds per module and tensor."""
        if not all(module.in_place() for module in self._modules):
            raise ModelChangedError(
                "the model was moved, re-typed or restructured after wrapping; wrap it again"
            )
        if not _same(self._model.config, self._config) or not all(
            m.as_it_was() for m in self._modules
        ):
            raise ModelChangedError(
                "settings, hooks or forwards of the model changed after wrapping; wrap it again"
            )
        return not self.same_tensors()

    def same_tensors(self) -> bool:
        """Whether tensors are where and what they were: all that a running request depends on."""
        return self._tensors.same()

    def training(self) -> bool:
        """Whether any module is in training mode: dropout of an adapter that came after eval() is."""
        return any(module.training for module in self._originals)


class _Module:
    """One module and its copy in the twin, as they were: what decides answers besides values.

    Args:
        free: its settings may change (a twin is made for each).
    """

    def __init__(self, module: torch.nn.Module, twin: torch.nn.Module, free: bool):
        self._module = module
        self._twin = twin
        self._children = list(module._modules.values())
        self._places = self._where()
        known = {} if free else {n: v for n, v in vars(module).items() if n not in VOLATILE}
        self._plain = {name: value for name, value in known.items() if isinstance(value, PLAIN)}
        frozen = {
            name: freeze(value) for name, value in known.items() if isinstance(value, HOLDERS)
        }
        self._holders = {name: value for name, value in frozen.items() if value is not None}
        self._free = free
        self._rest = self._other()

    def in_place(self) -> bool:
        """Whether children and tensors are the same objects in the same memory, the twin's too."""
        children = self._module._modules.values()
        same = len(children) == len(self._children) and all(map(is_, children, self._children))
        return same and self._where() == self._places

    def _where(self) -> list[tuple[object, ...]]:
        own, copied = self._module, self._twin
        found: list[tuple[object, ...]] = []
        for ours, theirs in (
            (own._parameters, copied._parameters),
            (own._buffers, copied._buffers),
        ):
            for name, tensor in ours.items():
                if tensor is not None:
                    found += _places(name, tensor, theirs[name])
        return found

    def as_it_was(self) -> bool:
        """Whether type, plain attributes, hooks and forward are the same."""
        now, missing = self._module.__dict__, object()
        same = all(now.get(name, missing) == value for name, value in self._plain.items())
        same = same and all(freeze(now.get(name)) == value for name, value in self._holders.items())
        return same and self._other() == self._rest

    def _other(self) -> tuple[object, ...]:
        module = self._module
        now, hooks = module.__dict__, _hooks(module)
        names = 0 if self._free else len(now) - sum(name in now for name in VOLATILE)
        return type(module), names, hooks, id(now.get("forward"))


def _hooks(module: torch.nn.Module) -> tuple[int, ...]:
    """Keys of the hooks that may change what a module does."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return ()
    both = (*module._forward_hooks.items(), *module._forward_pre_hooks.items())
    return tuple(key for key, hook in both if getattr(hook, "__module__", "") != _CAPTURING)


def _places(name: str, tensor: torch.Tensor, twin: torch.Tensor | None) -> list[tuple[object, ...]]:
    """Where a tensor's numbers are, and whether a twin's are there too."""
    found: list[tuple[object, ...]] = []
    twins = {} if twin is None else {at: part.data_ptr() for at, part in parts(name, twin)}
    for inner, part in parts(name, tensor):
        place = part.data_ptr()
        strides = part.stride() if part.layout == torch.strided else ()
        shared = twins.get(inner) == place
        found.append((inner, place, part.dtype, part.device, part.shape, strides, shared))
    return found


def _same(ours: object, theirs: object) -> bool:
    """Whether two configurations are equal; their own comparison fails if layers differ in width."""
    if isinstance(ours, PreTrainedConfig) and isinstance(theirs, PreTrainedConfig):
        return type(ours) is type(theirs) and _same(vars(ours), vars(theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return bool(ours == theirs)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
