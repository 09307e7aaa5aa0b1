"""Stores that are slow, hang, or answer with something else, under real models."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from chunkcache.stores import Key
from chunkcache.stores.base import Buffer
from chunkcache.stores.redis import RedisStore
from tests.faults.conftest import StartRedis
from tests.faults.world import (
    KINDS,
    PATIENCE,
    assert_all_whole,
    check,
    check_again,
    count,
    guards,
    rows,
    wrap,
)

LONG = 20.0  # seconds that a request may take here, with all its time-outs


class Proxy:
    """Stands before a server and holds back what it is asked."""

    def __init__(self, port: int):
        self.delay = 0.0
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                return
            self._sockets += [client, server]
            for pair in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, slow: bool) -> None:
        try:
            while data := source.recv(2**20):
                time.sleep(self.delay if slow else 0.0)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return  # closed

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for one in (self._listener, *self._sockets):
            one.close()


@pytest.fixture
def proxy(start_redis: StartRedis) -> Iterator[Proxy]:
    proxy = Proxy(start_redis().port)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("delay", [1.0, 2.5])
def test_a_slow_store(name: str, delay: float, proxy: Proxy) -> None:
    """Within the patience of a request, and beyond it."""
    first, second = rows("slow", 2)
    with wrap(name, f"redis://127.0.0.1:{proxy.port}?timeout=5s") as cached:
        check(cached, name, first)
        assert cached.settle(PATIENCE)
        proxy.delay = delay
        for row in (first, second):
            cached.flush()
            begin = time.monotonic()
            check(cached, name, row, delay)
            assert time.monotonic() - begin < LONG
        cached.settle(PATIENCE)
        if delay > 2:
            assert cached.stats().stores["redis"]["timeouts"] > 0 and count(cached, "failed") > 0
        proxy.delay = 0.0
        check_again(cached, name, first, "redis")
        assert count(cached, "corrupt") == 0
    assert_all_whole([f"redis://127.0.0.1:{proxy.port}"])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", KINDS)
def test_a_redis_that_hangs(name: str, start_redis: StartRedis) -> None:
    """It is stopped, so that connections stay open and nothing answers."""
    server, asked = start_redis(), rows("hang", 6)
    with wrap(name, server.url) as cached:
        check(cached, name, asked[0])
        cached.settle(PATIENCE)
        server.signal(signal.SIGSTOP)
        try:
            for row in asked[:3]:
                cached.flush()
                begin = time.monotonic()
                check(cached, name, row)
                assert time.monotonic() - begin < LONG
            assert cached.stats().stores["redis"]["failures"] > 0 and count(cached, "failed") > 0
        finally:
            server.signal(signal.SIGCONT)
        for row in asked:
            check_again(cached, name, row, "redis")
        assert count(cached, "corrupt") == 0
    assert_all_whole([server.url])


@pytest.mark.usefixtures("quick")
def test_a_file_system_that_hangs(tmp_path: Path) -> None:
    """Reading a pipe in the place of a file waits for ever."""
    (row,), place = rows("pipe", 1), f"disk:{tmp_path}/store"
    with wrap("llama", place) as cached:
        check(cached, "llama", row)
        cached.settle(PATIENCE)
        path = max(tmp_path.glob("store/values/*/*"), key=lambda path: path.stat().st_size)
        value = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        cached.flush()
        begin = time.monotonic()
        check(cached, "llama", row)
        assert time.monotonic() - begin < LONG
        assert cached.stats().stores["disk"]["timeouts"] > 0
        path.rename(tmp_path / "pipe")
        path.write_bytes(value)
        end = os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK)  # whoever waits goes on
        os.close(end)
        check_again(cached, "llama", row, "disk")
    assert_all_whole([place])


@pytest.mark.parametrize("name", KINDS)
def test_a_store_that_answers_with_values_of_others(
    name: str, start_redis: StartRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, asked, random_ = start_redis(), rows("lies", 5), random.Random("lies")
    honest = RedisStore.get
    seen: list[Buffer] = []

    def lie(self: RedisStore, keys: Sequence[Key]) -> list[Buffer | None]:
        found = honest(self, keys)
        seen.extend(value for value in found if value is not None)
        return [value and random_.choice(seen) for value in found]

    with wrap(name, server.url) as cached:
        for row in asked:
            check(cached, name, row)
        cached.settle(PATIENCE)
        with monkeypatch.context() as patched:
            patched.setattr(RedisStore, "get", lie)
            for number in range(30):
                cached.flush()
                check(cached, name, random_.choice(asked), number)
            cached.settle(PATIENCE)
        assert count(cached, "corrupt") > 0
        assert not guards(cached)[0].open
        assert_all_whole([server.url])
        for row in asked:
            check_again(cached, name, row, "redis")
        assert_all_whole([server.url])
