"""Disks that are full or only read, and tenants that share a Redis."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.conftest import StartRedis
from tests.faults.world import PATIENCE, assert_all_whole, check, count, rows, wrap


def test_a_disk_that_is_full_or_only_read(tmp_path: Path) -> None:
    """In a process of its own, where a small one is mounted."""
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    command = [*unshare, sys.executable, "-m", "tests.faults.small_disk", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_tenants_of_one_redis_never_hit_each_other(start_redis: StartRedis) -> None:
    """Nor do they while both are busy."""
    url = start_redis().url

    def use(tenant: str, own: int) -> None:
        """Prompts of the other are cold until they were asked here."""
        with wrap("llama", url, tenant=tenant) as cached:
            for turn in range(2):
                for seed in (own, 1 - own):
                    cached.flush()
                    found = check(cached, "llama", prompts[seed], (tenant, turn, seed))
                    assert bool(found.cached_tokens) == bool(turn), (tenant, turn, seed)
                    assert cached.settle(PATIENCE)
            assert count(cached, "corrupt") == count(cached, "failed") == 0

    prompts = [rows(f"tenant {number}", 1)[0] for number in range(2)]
    use("a", 0)
    use("b", 1)  # after the other
    with ThreadPoolExecutor(2) as pool:  # beside each other
        for each in [pool.submit(use, tenant, n) for n, tenant in enumerate("cd")]:
            each.result(2 * PATIENCE)
    assert assert_all_whole([url]) > 0
