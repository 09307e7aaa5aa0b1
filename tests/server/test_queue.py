"""One at a time, in order; a client that leaves frees what it held; a server ends gracefully."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import openai
import pytest

from chunkcache.demo.facts import Shop
from chunkcache.engine import Event, Failed, Job, Runner, Sampling
from chunkcache.errors import ClosedError
from tests.server.conftest import MODEL, Running, chat, running, until


@contextmanager
def long_answer(server: Running, shop: Shop) -> Iterator[Any]:
    """A request that runs until its client leaves, for thousands of tokens."""
    stream = server.openai.chat.completions.create(
        model=MODEL,
        messages=chat(shop, shop.questions[0].question),
        max_tokens=4000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    try:
        yield stream
    finally:
        stream.close()


def idle(server: Running) -> bool:
    return server.metric("chunkcache_requests_running") == 0


def waiting(server: Running, number: int) -> None:
    until(lambda: server.metric("chunkcache_requests_waiting") == number)


def test_a_client_that_leaves_stops_its_request(server: Running, shop: Shop) -> None:
    cancelled = server.metric("chunkcache_requests_total", outcome="cancelled")
    server.openai.chat.completions.create(
        model=MODEL, messages=chat(shop, shop.questions[1].question), max_tokens=4
    )
    with long_answer(server, shop):
        assert server.stats()["leased_chunks"] > 0
        until(lambda: server.stats()["tail_bytes"] > 0)  # none while a prompt is whole chunks
    until(lambda: idle(server), seconds=10)
    stats = server.stats()
    assert stats["leased_chunks"] == 0
    assert stats["tail_bytes"] == 0
    assert server.metric("chunkcache_requests_total", outcome="cancelled") == cancelled + 1


def test_a_plain_request_is_cancelled_too(server: Running, shop: Shop) -> None:
    body = {"prompt": shop.system_prompt, "max_tokens": 4000, "ignore_eos": True}
    with pytest.raises(httpx2.ReadTimeout):
        server.http.post("/v1/completions", json=body, timeout=1.0)
    until(lambda: idle(server), seconds=10)
    assert server.stats()["leased_chunks"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_waiting_request_is_dropped(server: Running, shop: Shop, stream: bool) -> None:
    requests = server.stats()["requests"]
    with long_answer(server, shop):
        body = {"prompt": shop.system_prompt, "max_tokens": 4, "stream": stream}
        with pytest.raises(httpx2.ReadTimeout):
            server.http.post("/v1/completions", json=body, timeout=0.5)
        waiting(server, 0)
        assert not idle(server)
    until(lambda: idle(server))
    assert server.stats()["requests"] == requests + 1  # the dropped one never ran


def test_first_come_first_served_and_full(server: Running, shop: Shop) -> None:
    ended: list[int] = []

    def client(number: int) -> None:
        body = {"prompt": shop.system_prompt[:100], "max_tokens": 2}
        assert narrow.http.post("/v1/completions", json=body).status_code == 200
        ended.append(number)

    with running(server.cached, queue_limit=3) as narrow:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(3)]
        with long_answer(narrow, shop):
            for number, thread in enumerate(threads):
                thread.start()
                waiting(narrow, number + 1)
            with pytest.raises(openai.InternalServerError) as caught:
                narrow.openai.completions.create(model=MODEL, prompt="x", max_tokens=1)
            assert caught.value.status_code == 503
            assert caught.value.code == "queue_full"
            assert not ended
        for thread in threads:
            thread.join()
    assert ended == [0, 1, 2]


def test_an_ending_server_lets_the_running_request_go(server: Running, shop: Shop) -> None:
    with running(server.cached) as ending:
        stream = ending.openai.completions.create(
            model=MODEL,
            prompt=shop.system_prompt,
            max_tokens=40,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        ending.end()
        assert len(list(stream)) > 1
    assert server.stats()["leased_chunks"] == 0


def test_a_closed_runner_tells_everybody(server: Running, shop: Shop) -> None:
    heard: list[list[Event]] = [[], []]
    runner = Runner(server.cached)
    sampling = Sampling(4000, temperature=0, ignore_eos=True)
    ids = server.cached.tokenizer(shop.system_prompt).input_ids
    runner.submit(Job([ids], sampling, heard[0].append))
    until(lambda: heard[0])
    runner.submit(Job([ids], sampling, heard[1].append))
    runner.close()
    assert not runner.alive
    for events in heard:
        assert isinstance(events[-1], Failed)
        assert isinstance(events[-1].error, ClosedError)
    assert len(heard[1]) == 1
    with pytest.raises(ClosedError):
        runner.submit(Job([ids], sampling, heard[1].append))
    assert server.stats()["leased_chunks"] == 0
