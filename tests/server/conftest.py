"""The built-in model behind a real uvicorn server, and the real OpenAI SDK in front of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx2
import pytest
import torch
import uvicorn
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, AutoTokenizer

import chunkcache
from chunkcache.demo import model_path
from chunkcache.demo.facts import HELD_OUT_SEED, Shop, make_shop
from chunkcache.server import create_app

MODEL = "demo"
CHUNK = 16


class Running(NamedTuple):
    """A server that runs, as its clients see it, and the model inside."""

    url: str
    openai: OpenAI
    http: httpx2.Client
    cached: chunkcache.CachedModel
    end: Callable[[], None]

    def stats(self) -> dict[str, Any]:
        return self.http.get("/stats").json()

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics; 0 if it is not there yet."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(found)


@contextlib.contextmanager
def running(cached: chunkcache.CachedModel, **options: Any) -> Iterator[Running]:
    """A server on a free port, in a thread of this process."""
    app = create_app(cached, model_name=MODEL, **options)
    config = uvicorn.Config(app, port=0, log_level="warning", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    def end() -> None:
        server.should_exit = True

    key = next(iter(options.get("api_keys", ())), "none")
    try:
        with (
            OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client,
            httpx2.Client(base_url=url, timeout=60) as http,
        ):
            yield Running(url, client, http, cached, end)
    finally:
        end()
        thread.join(30)
    assert not thread.is_alive()


def until(true: Callable[[], object], seconds: float = 30) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def cached() -> Iterator[chunkcache.CachedModel]:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    config = chunkcache.Config(chunk_size=CHUNK, device_bytes="64MiB")
    with chunkcache.wrap(model, tokenizer, config) as wrapped:
        yield wrapped


@pytest.fixture(scope="session")
def session_server(cached: chunkcache.CachedModel) -> Iterator[Running]:
    with running(cached) as server:
        yield server


@pytest.fixture
def server(session_server: Running) -> Running:
    """The server with nothing stored and nothing running."""
    until(lambda: session_server.metric("chunkcache_requests_running") == 0)
    session_server.cached.flush()
    return session_server


@pytest.fixture(scope="session")
def shop() -> Shop:
    return make_shop(HELD_OUT_SEED, fact_tokens=200)


def chat(shop: Shop, question: str) -> list[dict[str, str]]:
    """A user's first turn with the shop's bot."""
    return [
        {"role": "system", "content": shop.system_prompt},
        {"role": "user", "content": question},
    ]


def ids_of(cached: chunkcache.CachedModel, messages: list[dict[str, str]]) -> list[int]:
    """The prompt as the server must build it."""
    return cached.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def plain_answer(cached: chunkcache.CachedModel, ids: list[int], tokens: int = 24) -> str:
    """What the model says without the cache."""
    prompt = torch.tensor([ids])
    output = cached.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False
    )
    return cached.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
