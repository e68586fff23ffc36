"""A shard with a journal that dies and comes back: the job waits for it, and goes on with what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from coordinator_fakes import Cluster, FakeShard, specification

from paramserver.coordinator.failover import RECOVERY_SECONDS


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.store.close()


def submit(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 3}, durability={"log": "journal"}))


def die_in(cluster: Cluster, state: str) -> set[int]:
    """Kill shard-1 in that state, with everybody at a standstill; returns the blocks whose values it had."""
    if state == "initialising":
        cluster.worker("worker-0").is_stuck = True
        cluster.run(2)
    else:
        cluster.run(30, until=state)
    for worker in cluster.workers():
        worker.is_stuck = True
    held = set(cluster.shard("shard-1").initialised)
    cluster.kill("shard-1")
    cluster.run(5)
    assert cluster.state() == state
    return held


def go_on(cluster: Cluster) -> None:
    for worker in cluster.workers():
        worker.is_stuck = False
    cluster.run(90, until="done")


@pytest.mark.parametrize("state", ["initialising", "training", "evaluating", "exporting"])
def test_a_job_waits_for_a_dead_shard_with_a_journal_and_goes_on_with_it(cluster: Cluster, state: str) -> None:
    submit(cluster)
    held = die_in(cluster, state)
    waiting = cluster.core.snapshot(cluster.now)["job"]["waiting"]
    assert "waiting for shard-1, with the journal" in waiting
    cluster.start(FakeShard("shard-1", pid=99, port=2, journal=held))
    cluster.run(3)
    assert cluster.core.snapshot(cluster.now)["job"]["waiting"] == ""
    if state != "initialising":
        order = cluster.worker("worker-0").order
        assert order is not None
        assert "tcp://shard-1:2" in {shard.address for shard in order.placement}
    go_on(cluster)
    assert cluster.written["job"]["shards_recovered"] == ["shard-1"]


def test_workers_hear_of_the_new_address_before_their_next_heartbeat(cluster: Cluster) -> None:
    submit(cluster)
    held = die_in(cluster, "training")
    shard = FakeShard("shard-1", pid=99, port=2, journal=held)
    before = cluster.sent["Orders"]
    cluster.processes = {"shard-1": shard}  # nobody else speaks
    cluster.run(0.3)
    assert cluster.sent["Orders"] - before >= 2, "both workers are told unasked"


def test_a_shard_that_stays_away_fails_the_job(cluster: Cluster) -> None:
    submit(cluster)
    die_in(cluster, "training")
    cluster.run(RECOVERY_SECONDS + 2, until="failed")
    assert f"'shard-1' died (it did not come back within {RECOVERY_SECONDS:.0f} s)" in cluster.reason()


@pytest.mark.parametrize("state", ["training", "evaluating"])
def test_a_shard_that_comes_back_without_its_values_fails_the_job(cluster: Cluster, state: str) -> None:
    submit(cluster)
    die_in(cluster, state)
    cluster.start(FakeShard("shard-1", pid=99, port=2))
    cluster.run(5, until="failed")
    assert "it has lost their values" in cluster.reason()


def test_a_shard_that_cannot_use_its_journal_fails_the_job_with_its_words(cluster: Cluster) -> None:
    submit(cluster)
    held = die_in(cluster, "training")
    shard = FakeShard("shard-1", pid=99, port=2, journal=held)
    shard.failed = "segment-1.log: damaged at byte 7"
    cluster.start(shard)
    cluster.run(5, until="failed")
    assert cluster.reason() == "'shard-1' says: segment-1.log: damaged at byte 7"


def test_training_does_not_end_without_a_shard_that_is_away(cluster: Cluster) -> None:
    """Its last report says that all is published, but nobody knows what it was asked since."""
    submit(cluster)
    cluster.run(30, until="draining")
    cluster.kill("shard-1")
    cluster.run(8)
    assert cluster.state() == "draining"


def test_a_shard_and_the_coordinator_that_die_together_come_back_together(cluster: Cluster) -> None:
    submit(cluster)
    held = die_in(cluster, "training")
    cluster.kill_coordinator()
    cluster.run(3)
    cluster.restart_coordinator()
    cluster.run(20)
    assert cluster.state() == "training"
    cluster.start(FakeShard("shard-1", pid=99, port=2, journal=held))
    cluster.run(3)
    go_on(cluster)
    assert cluster.written["job"]["shards_recovered"] == ["shard-1"]
