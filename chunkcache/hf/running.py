"""Which layer a forward in progress stored last: for keys that are rebuilt behind the cache.

Latent attention stores one small key per token and makes others of it before it attends, so the note
that a stored key carries is lost. The modules of a twin know whose hooks run their forwards, and these
know the cache; several threads run the same modules at once.
"""

from __future__ import annotations

import threading
import weakref

import torch

from chunkcache.hf.cache import ChunkCache, Note

_NAME = "_chunkcache_running"


class Running(threading.local):
    """The cache of this thread's forward."""

    cache: weakref.ref[ChunkCache] | None = None

    def __deepcopy__(self, memo: object) -> Running:
        return Running()


def announce(model: torch.nn.Module) -> Running:
    """Lets every module of a twin find what it runs for."""
    running = Running()
    for module in model.modules():
        module.__dict__[_NAME] = running
    return running


def latest(module: torch.nn.Module) -> Note | None:
    """The layer that this thread's forward stored last."""
    running: Running | None = module.__dict__.get(_NAME)
    cache = running.cache() if running is not None and running.cache is not None else None
    return None if cache is None else cache.latest
