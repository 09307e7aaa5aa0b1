"""What a module of a twin can ask about the forward in progress; several threads run it at once.

Latent attention stores one small key per token and makes others of it before it attends, so the note
that a stored key carries is lost: it asks which layer was stored last. Some mixers run a single token
by other rules than several: they ask whether it belongs to the prompt.
"""

from __future__ import annotations

import threading
import weakref

import torch

from chunkcache.hf.cache import ChunkCache, Note

_NAME = "_chunkcache_running"


class Running(threading.local):
    """The cache of this thread's forward, and whether it adds tokens of a prompt."""

    cache: weakref.ref[ChunkCache] | None = None
    prompt = False

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


def adds_prompt(module: torch.nn.Module) -> bool:
    """Whether this thread's forward adds tokens of a prompt, not one that was generated."""
    running: Running | None = module.__dict__.get(_NAME)
    return running is not None and running.prompt
