"""Servers that start fast: `python -m tests.faults.host LOG` loads all once and forks one for each order.

A line of JSON in, a line out. `{"start": {"port": .., "stores": [..], "environment": {..}}}` gives
`{"pid": ..}`; `{"kill": pid}` kills it as `kill -9` does and gives `{"alive": ..}`: whether it ran until
then; `{"end": pid}` asks it to end and gives `{"code": ..}`, how it did; `{"show": pid}` has it write to
LOG what its threads do. Servers end with their host, and the host with who started it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
from typing import Any

import torch

import chunkcache
import chunkcache.stores.redis  # so that no child imports it
from chunkcache.demo import model_path
from chunkcache.server import serve

CHUNK = 16
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main(log: str) -> None:
    torch.set_num_threads(1)
    model, tokenizer = _load()
    print(json.dumps({"threads": len(os.listdir("/proc/self/task"))}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            answer = {"pid": _start(model, tokenizer, log, **order["start"])}
        elif "show" in order:
            answer = {"shown": os.kill(order["show"], signal.SIGUSR1)}
        elif "end" in order:
            os.kill(order["end"], signal.SIGTERM)
            _, status = os.waitpid(order["end"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            answer = {"alive": _kill(order["kill"])}
        print(json.dumps(answer), flush=True)


def _load() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    with _wrap(model, tokenizer):  # what compiled code finds out once
        return model, tokenizer


def _wrap(model: Any, tokenizer: Any, stores: tuple[str, ...] = ()) -> Any:
    config = chunkcache.Config(chunk_size=CHUNK, device_bytes="32MiB", stores=stores)
    return chunkcache.wrap(model, tokenizer, config)


def _start(model: Any, tokenizer: Any, log: str, **order: Any) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _detach(parent, log)
        os.environ.update(order["environment"])
        cached = _wrap(model, tokenizer, tuple(order["stores"]))
        serve(cached, model_name="demo", port=order["port"], log_level="warning")
    finally:
        os._exit(1)  # whatever it was, nothing of the host's runs here


def _detach(parent: int, log: str) -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(old, new)
    faulthandler.register(signal.SIGUSR1)  # says where it hangs


def _kill(pid: int) -> bool:
    done, _ = os.waitpid(pid, os.WNOHANG)
    if not done:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return not done


if __name__ == "__main__":
    main(sys.argv[1])
