"""Nodes of a cluster and primaries of a set are killed; clients go on without a restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chunkcache.stores.open import open_store
from tests.faults.world import (
    assert_all_whole,
    check,
    check_again,
    count,
    kept,
    rows,
    until,
    wrap,
)
from tests.stores.servers import Server, cluster, replicas, watched

ASKED = [rows(seed, 1)[0] for seed in range(12)]  # their chunks lie on all nodes


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Server]]:
    nodes = cluster(tmp_path, 3, "--appendonly", "yes")
    yield nodes
    for node in nodes:
        node.kill()


def url_of(nodes: list[Server]) -> str:
    return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


def fill(cached: Any) -> None:
    for row in ASKED:
        check(cached, "llama", row)
    assert cached.settle(60)


def go_on(cached: Any, during: Callable[[], bool], what: str) -> None:
    """Asks until something happened; every answer is right, hit or miss."""
    number = 0

    def happened() -> bool:
        nonlocal number
        cached.flush()
        check(cached, "llama", ASKED[number % len(ASKED)], what)
        number += 1
        return during()

    until(happened, what, pause=0.1)


def has_all_hits(cached: Any, nodes: list[Server]) -> None:
    """Without a restart, for prompts on every node."""
    for row in ASKED:
        check_again(cached, "llama", row, "redis", "after it")
    assert_all_whole([url_of(nodes)])


def leads(server: Server) -> bool:
    """Whether it is a primary now."""
    return server.client().info("replication")["role"] == "master"


@pytest.mark.usefixtures("quick")
def test_a_replica_takes_over_for_a_node_of_a_cluster(nodes: list[Server], tmp_path: Path) -> None:
    copies = replicas(tmp_path, nodes)
    try:
        with wrap("llama", url_of(nodes)) as cached:
            fill(cached)
            wait_for_copies(nodes, copies)
            with closing(open_store(url_of(nodes))) as store:
                before = kept(store)
            nodes[1].kill()
            go_on(cached, lambda: leads(copies[1]), "a failover")
            has_all_hits(cached, [nodes[0], copies[1], nodes[2]])
            assert count(cached, "failed") > 0 and count(cached, "corrupt") == 0
            with closing(open_store(url_of(copies))) as store:
                assert kept(store).keys() >= before.keys(), "replicas had everything"
            nodes[1].start()  # as a replica now
            go_on(cached, lambda: not leads(nodes[1]), "the node that comes back")
            has_all_hits(cached, nodes)
    finally:
        for copy in copies:
            copy.kill()


def wait_for_copies(nodes: list[Server], copies: list[Server]) -> None:
    for node, copy in zip(nodes, copies, strict=True):
        until(
            lambda n=node, c=copy: n.client().dbsize() == c.client().dbsize(),
            "a replica that has everything",
        )


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", range(3))
def test_a_node_without_replica_comes_back(number: int, nodes: list[Server]) -> None:
    """First none of its keys can be had, then no key at all."""
    with wrap("llama", url_of(nodes)) as cached:
        fill(cached)
        nodes[number].kill()
        other = nodes[(number + 1) % 3].client()
        go_on(cached, lambda: state_of(other) == "fail", "a cluster that is down")
        assert count(cached, "failed") > 0
        nodes[number].start()
        go_on(cached, lambda: state_of(other) == "ok", "a cluster that is up again")
        has_all_hits(cached, nodes)
        assert count(cached, "corrupt") == 0


def state_of(client: Any) -> str:
    answer = client.execute_command("CLUSTER INFO")
    return str(answer["cluster_state"])


@pytest.mark.usefixtures("quick")
def test_sentinel_names_another_primary(tmp_path: Path) -> None:
    primary, replica, sentinels = watched(tmp_path)
    hosts = ",".join(f"127.0.0.1:{one.port}" for one in sentinels)
    url = f"redis+sentinel://{hosts}/main"
    try:
        with wrap("llama", url) as cached:
            fill(cached)
            wait_for_copies([primary], [replica])
            primary.kill()
            go_on(cached, lambda: leads(replica), "a failover")
            for row in ASKED:
                check_again(cached, "llama", row, "redis")
            assert count(cached, "failed") > 0 and count(cached, "corrupt") == 0
            assert_all_whole([url])
            primary.start()  # the sentinels make it a replica
            go_on(cached, lambda: not leads(primary), "the old primary that comes back")
            check_again(cached, "llama", ASKED[0], "redis")
            assert_all_whole([url])
    finally:
        for server in (*sentinels, primary, replica):
            server.kill()
