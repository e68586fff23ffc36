"""Shards that back each other up while they die, stop and lose sight of each other: seeded schedules, each of which
prints itself where it fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from replication_rig import PARTS, WORKERS, Process, Worker, World

from paramserver.shard import server
from paramserver.shard.journal import keeper, segments
from paramserver.shard.replication import source, stream
from paramserver.shard.serving import Serving

JOBS: dict[str, dict[str, Any]] = {
    "fresh": {"optimizer": {"name": "sgd", "lr": 1.0}, "push": {"encoding": "fp32"}, "pull": {"encoding": "fp32"}},
    "published": {"optimizer": {"name": "adagrad"}, "push": {"encoding": "int4"}, "pull": {"encoding": "ternary"}},
    "sync": {
        "optimizer": {"name": "rmsprop"},
        "push": {"encoding": "int4"},
        "pull": {"encoding": "int2"},
        "consistency": {"mode": "sync", "quorum": 2},
    },
}
SEEDS = 12  # of each job and log
STEPS = 160


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which every schedule sees several segments, snapshots, pieces of chunks and full windows."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 2500)
    monkeypatch.setattr(segments, "GATHER_BYTES", 300)
    monkeypatch.setattr(keeper, "SNAPSHOT_BYTES", 3000)
    monkeypatch.setattr(keeper, "SNAPSHOT_RATIO", 0)
    monkeypatch.setattr(keeper, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(source, "CHUNK_BYTES", 600)
    monkeypatch.setattr(stream, "PIECE_BYTES", 400)
    monkeypatch.setattr(stream, "WINDOW_BYTES", 2000)
    monkeypatch.setattr(stream, "NEAR_BYTES", 3000)
    promote = server.ShardServer._promote

    def checked(self: server.ShardServer, standby: Any, order: Any) -> None:
        """Look at what a backup takes over before it serves."""
        promote(self, standby, order)
        part = self._parts.get(order.part)
        if part is not None and part.core.serving is not None:
            home = self._around.home
            home.world.counts.taken_over += 1
            home.world.check_served(home.shard, order.part, part.core.serving, part._journal.number)

    monkeypatch.setattr(server.ShardServer, "_promote", checked)


def run(world: World, what: str) -> None:
    try:
        world.run(STEPS)
    except BaseException as error:
        raise AssertionError(f"{what}: {error}") from error


@pytest.mark.parametrize("log", ["journal", "journal+fsync"])
@pytest.mark.parametrize("job", JOBS)
def test_nothing_acknowledged_is_lost_whoever_dies(job: str, log: str) -> None:
    fired: dict[str, int] = {}
    for seed in range(SEEDS):
        world = World(seed, log, **JOBS[job])
        run(world, f"seed {seed} of {job} with {log}")
        for name in ("crashes", "stops", "cuts", "deafnesses", "full_disks", "compared", "taken_over"):
            fired[name] = fired.get(name, 0) + getattr(world.counts, name)
        for name in ("promotions", "grants", "handovers"):
            fired[name] = fired.get(name, 0) + getattr(world.coordinator, name)
    print(fired)
    assert fired["crashes"] > SEEDS
    assert fired["taken_over"] > SEEDS / 2
    assert fired["grants"] > SEEDS / 4
    assert fired["compared"] > 10 * SEEDS
