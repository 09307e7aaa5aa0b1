"""The whole server is killed at any moment while clients ask, and started again on the same stores."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import httpx2
import pytest

from chunkcache.demo.facts import HELD_OUT_SEED, make_shop
from tests.faults.conftest import StartRedis
from tests.faults.world import KILLS, PATIENCE, always, assert_all_whole, groups, until
from tests.stores.servers import free_port

_LOAD = 180.0  # seconds to import and load everything
SHOPS = [make_shop(HELD_OUT_SEED + number, fact_tokens=60) for number in range(3)]
CHATS = [
    [
        {"role": "system", "content": shop.system_prompt},
        {"role": "user", "content": shop.questions[number].question},
    ]
    for shop in SHOPS
    for number in range(2)
]


class Host:
    """The process that forks servers."""

    def __init__(self, folder: Path):
        self.log = folder / "servers.log"
        command = [sys.executable, "-m", "tests.faults.host", str(self.log)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.errors = open(folder / "host.log", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )
        assert self.read(_LOAD) == {"threads": 1}, "forking is safe only with one"

    def read(self, seconds: float = PATIENCE) -> Any:
        """The next answer."""
        stdout = self.process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], seconds)[0]:
            raise AssertionError("the host of the servers hangs")
        return json.loads(stdout.readline())

    def order(self, **what: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)
        self.errors.close()


class Served:
    """One server; it may not be up yet, or not any more."""

    def __init__(self, host: Host, port: int, stores: list[str]):
        settings = {k: v for k, v in os.environ.items() if k.startswith("CHUNKCACHE_")}
        names = [always(store) for store in stores]
        order = {"port": port, "stores": names, "environment": settings}
        self.host, self.url = host, f"http://127.0.0.1:{port}"
        self.pid = host.order(start=order)["pid"]

    def kill(self) -> None:
        """As `kill -9`; it must have lived until then."""
        assert self.host.order(kill=self.pid)["alive"], self.host.log.read_text()[-2000:]

    def end(self) -> None:
        """As its user does; it writes what waits before it is gone."""
        code = self.host.order(end=self.pid)["code"]
        assert code == -signal.SIGTERM, (code, self.host.log.read_text()[-2000:])

    def wait(self, true: Callable[[], object], where: str) -> None:
        """Waits until something holds, and tells what the server did instead."""
        try:
            until(true, where)
        except AssertionError as error:
            self.host.order(show=self.pid)
            time.sleep(1)
            raise AssertionError(f"{error}\n{self.host.log.read_text()[-8000:]}") from error

    def up(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health", timeout=PATIENCE).status_code == 200
        except httpx2.TransportError:
            return False

    def ask(self, chat: list[dict[str, str]]) -> tuple[str, int] | None:
        """The answer and how much of the prompt was cached; None if the server died over it."""
        body = {"model": "demo", "messages": chat, "max_tokens": 12, "temperature": 0}
        try:
            found = httpx2.post(f"{self.url}/v1/chat/completions", json=body, timeout=PATIENCE)
        except httpx2.TimeoutException as error:
            raise AssertionError("a request hangs") from error
        except httpx2.TransportError:
            return None
        assert found.status_code == 200, found.text
        answer = found.json()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return answer["choices"][0]["message"]["content"], cached

    def stores(self) -> dict[str, Any]:
        """What moved, and what each kind of store did."""
        found: dict[str, Any] = httpx2.get(f"{self.url}/stats", timeout=PATIENCE).json()["stores"]
        return found


@contextmanager
def served(host: Host, port: int, *stores: str) -> Iterator[Served]:
    """A server until the end of the block; it is killed if that fails."""
    server = Served(host, port, list(stores))
    try:
        until(server.up, "a server that comes up")
        yield server
    except BaseException:
        server.kill()
        raise
    server.end()


def ask_all(server: Served) -> list[str]:
    """What a server answers to each chat."""
    found = [server.ask(chat) for chat in CHATS]
    return [answer[0] for answer in found if answer is not None]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))
    yield host
    host.close()


@pytest.fixture(scope="module")
def undisturbed(host: Host) -> list[str]:
    """What a server without stores answers to each chat."""
    with served(host, free_port()) as server:
        return ask_all(server)


@pytest.mark.parametrize("seed", groups(2))
def test_a_server_may_be_killed_at_any_moment(
    seed: int, host: Host, undisturbed: list[str], start_redis: StartRedis, tmp_path: Path
) -> None:
    redis, port = start_redis("--appendonly", "yes"), free_port()
    stores = [f"disk:{tmp_path}/store", redis.url]
    for trial in range(KILLS):
        where = f"seed={seed} trial={trial}"
        kill_one(host, port, stores, undisturbed, where)
        assert_all_whole(stores, where)
    with served(host, port, *stores) as server:  # all before it may have died too early to write
        assert ask_all(server) == undisturbed, f"seed={seed}"
    with served(host, port, *stores) as server:
        found = [server.ask(chat) for chat in CHATS]
        assert [answer and answer[0] for answer in found] == undisturbed, f"seed={seed}"
        assert all(answer and answer[1] > 0 for answer in found), f"not warm: seed={seed}"
        counts = server.stores()
    assert counts["loaded"] > 0 and counts["corrupt"] == counts["failed"] == 0
    assert assert_all_whole(stores, f"seed={seed}") > 0


def kill_one(host: Host, port: int, stores: list[str], wanted: list[str], where: str) -> None:
    """Starts a server and kills it: now and then before it is up, else some answers later."""
    random_, over, answers = random.Random(where), Event(), Counter[int]()
    server = Served(host, port, stores)
    with ThreadPoolExecutor(2) as clients:
        asking = []
        try:
            if random_.random() < 0.1:
                time.sleep(random_.random() * 0.5)
                return
            until(server.up, f"a server that comes up again: {where}")
            for client in range(2):
                ask = (server, over, wanted, random_.random(), where, answers, client)
                asking.append(clients.submit(ask_until, *ask))
            least = random_.randrange(4)
            server.wait(lambda: answers.total() >= least or any(o.done() for o in asking), where)
            time.sleep(random_.random() * 0.1)
        finally:
            over.set()
            server.kill()
        for each in asking:
            each.result(2 * PATIENCE)


def ask_until(
    server: Served,
    over: Event,
    wanted: list[str],
    seed: float,
    where: str,
    answers: Counter[int],
    client: int,
) -> None:
    """Asks at random until the server dies; each client counts its answers, all as they should be."""
    random_ = random.Random(seed)
    while not over.is_set():
        number = random_.randrange(len(CHATS))
        if (answer := server.ask(CHATS[number])) is None:
            assert over.is_set(), f"the server broke off before it was killed: {where}"
            return
        assert answer[0] == wanted[number], f"another answer: {where}"
        answers[client] += 1
