"""Shards that back each other up while they die, stop and lose sight of each other: seeded schedules, each of which
prints itself where it fails."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from replication_rig import PARTS, WORKERS, Worker, World

from paramserver.shard import server
from paramserver.shard.journal import keeper, segments
from paramserver.shard.replication import source, stream

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
SEEDS = 16  # of each job and log
MANY_SEEDS = 400
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
    monkeypatch.setattr(stream, "ASK_SECONDS", 0.1)
    monkeypatch.setattr(stream, "STALL_SECONDS", 0.2)
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


def run_all(job: str, log: str, seeds: range) -> None:
    fired: Counter[str] = Counter()
    for seed in seeds:
        world = World(seed, log, **JOBS[job])
        run(world, f"seed {seed} of {job} with {log}")
        fired.update(vars(world.counts))
        fired.update({name: getattr(world.coordinator, name) for name in ("promotions", "grants", "handovers")})
    # The faults have fired, and so has what they are to bring about.
    for name in ("crashes", "stops", "cuts", "deafnesses", "full_disks", "taken_over", "grants"):
        assert fired[name] > len(seeds) / 4, f"{name}: {fired}"
    assert fired["compared"] > 10 * len(seeds)
    assert fired["promotions"] > len(seeds) / 4


@pytest.mark.parametrize("log", ["journal", "journal+fsync"])
@pytest.mark.parametrize("job", JOBS)
def test_nothing_acknowledged_is_lost_whoever_dies(job: str, log: str) -> None:
    run_all(job, log, range(SEEDS))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("log", ["journal", "journal+fsync"])
@pytest.mark.parametrize("job", JOBS)
def test_nothing_acknowledged_is_lost_in_thousands_of_schedules(job: str, log: str) -> None:
    run_all(job, log, range(1000, 1000 + MANY_SEEDS))


@pytest.mark.parametrize("log", ["journal", "journal+fsync"])
def test_every_update_is_applied_exactly_once_across_failovers(log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each push of a worker adds one to an element of its own, so the weights count what was applied."""

    def one(self: World, worker: Worker, block: int, sequence: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        gradient = np.zeros((72, 40)[block], np.float32)
        gradient[10 * WORKERS.index(worker.name) + worker.incarnation] = -1.0
        return gradient

    monkeypatch.setattr(World, "gradient", one)
    for seed in range(500, 500 + SEEDS):
        world = World(seed, log, **JOBS["fresh"])
        run(world, f"seed {seed} with {log}")
        for part, record in world.coordinator.records.items():
            serving = world.serving_of(part, record)
            assert serving is not None
            (block,) = PARTS[part]
            held = serving.blocks[block]
            for name, (incarnation, sequence) in held.marks.as_dict().items():
                place = 10 * WORKERS.index(name) + incarnation
                assert held.weights[place] - place == sequence, f"seed {seed}, {name} at block {block}"
                worker = world.workers[WORKERS.index(name)]
                assert incarnation < worker.incarnation or sequence == worker.sequences[block], f"seed {seed}"
