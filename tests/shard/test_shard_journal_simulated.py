"""A shard that dies at every write: hundreds of seeded schedules, each of which prints itself where it fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from journal_rig import BLOCKS, WORKERS, Rig

from paramserver.shard.journal import keeper, segments

JOBS: dict[str, dict[str, Any]] = {
    "fresh": {"optimizer": {"name": "sgd", "lr": 1.0}, "push": {"encoding": "fp32"}, "pull": {"encoding": "fp32"}},
    "published": {"optimizer": {"name": "adagrad"}, "push": {"encoding": "int4"}, "pull": {"encoding": "ternary"}},
    "still": {
        "optimizer": {"name": "momentum"},
        "push": {"encoding": "int8"},
        "pull": {"encoding": "int4", "still": 0.2, "still_periods": 3},
    },
    "coded": {"optimizer": {"name": "adam"}, "push": {"encoding": "adaptive"}, "pull": {"encoding": "coded"}},
    "bounded": {
        "optimizer": {"name": "sgd", "lr": 0.01},
        "push": {"encoding": "int8"},
        "pull": {"encoding": "int8"},
        "consistency": {"mode": "bounded", "slack": 3, "damping": "sqrt"},
    },
    "sync": {
        "optimizer": {"name": "rmsprop"},
        "push": {"encoding": "int4"},
        "pull": {"encoding": "int2"},
        "consistency": {"mode": "sync", "quorum": 2},
    },
}
SEEDS = 20  # of each job and log


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which every schedule sees gathered and direct writes, several segments and several snapshots."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1500)
    monkeypatch.setattr(segments, "GATHER_BYTES", 300)
    monkeypatch.setattr(keeper, "SNAPSHOT_BYTES", 1200)
    monkeypatch.setattr(keeper, "SNAPSHOT_RATIO", 0)
    monkeypatch.setattr(keeper, "AGAIN_SECONDS", 0.0)


@pytest.mark.parametrize("log", ["journal", "journal+fsync"])
@pytest.mark.parametrize("job", JOBS)
def test_a_shard_that_dies_at_any_write_goes_on_with_what_it_acknowledged(job: str, log: str) -> None:
    crashes = recoveries = refusals = snapshots = 0
    for seed in range(SEEDS):
        rig = Rig(seed, log, **JOBS[job])
        try:
            rig.run(steps=40)
        except BaseException as error:
            raise AssertionError(f"seed {seed} of {job} with {log}: {error}") from error
        crashes += rig.crashes
        recoveries += rig.recoveries
        refusals += rig.refusals_to_write
        snapshots += rig.snapshots
    # The faults have fired.
    assert crashes > 2 * SEEDS
    assert recoveries > SEEDS
    assert refusals > SEEDS / 4
    assert snapshots > SEEDS


@pytest.mark.parametrize("log", ["journal", "journal+fsync"])
def test_every_update_is_applied_exactly_once(log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each push of a worker adds one to an element of its own, so the weights count what was applied."""

    def one(self: Rig, worker: str, block: int, sequence: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        gradient = np.zeros(100, np.float32)[: (72, 40)[block]]
        gradient[10 * WORKERS.index(worker) + self.workers[worker].incarnation] = -1.0
        return gradient

    monkeypatch.setattr(Rig, "gradient", one)
    for seed in range(SEEDS):
        rig = Rig(1000 + seed, log, **JOBS["fresh"])
        rig.run(steps=40)
        assert rig.core.serving is not None
        for block in BLOCKS:
            held = rig.core.serving.blocks[block]
            for name, (incarnation, sequence) in held.marks.as_dict().items():
                place = 10 * WORKERS.index(name) + incarnation
                assert held.weights[place] - place == sequence, f"seed {1000 + seed}, {name} at block {block}"
                worker = rig.workers[name]
                assert incarnation < worker.incarnation or sequence == worker.sequences[block]
