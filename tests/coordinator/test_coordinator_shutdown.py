"""The end of a cluster: all that have joined are told, workers first; a stop of the coordinator alone tells nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from coordinator_fakes import Cluster, specification

from paramserver.coordinator.core import FLUSH_SECONDS
from paramserver.coordinator.effects import Send
from paramserver.coordinator.sessions import SESSION_SECONDS
from paramserver.protocol.messages import Orders


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    made.submit(specification(stop={"epochs": 40}, durability={"log": "journal"}))
    made.run(20, until="training")
    made.run(1)
    yield made
    made.store.close()


def told_to_end(cluster: Cluster) -> set[str]:
    return {name for name, process in cluster.processes.items() if process.is_told_to_end}


def test_workers_are_told_at_once_and_shards_when_no_worker_is_left(cluster: Cluster) -> None:
    cluster.carry_out(cluster.core.shut_down(cluster.now))
    assert told_to_end(cluster) == {"worker-0", "worker-1"}
    cluster.run(1)
    assert told_to_end(cluster) == {"worker-0", "worker-1"}, "workers may still need the shards to flush"
    cluster.kill("worker-0")
    cluster.kill("worker-1")
    cluster.run(SESSION_SECONDS + 1)
    assert told_to_end(cluster) == {"shard-0", "shard-1"}


def test_shards_do_not_wait_for_a_worker_that_hangs(cluster: Cluster) -> None:
    cluster.carry_out(cluster.core.shut_down(cluster.now))
    cluster.run(FLUSH_SECONDS + 1)
    assert {"shard-0", "shard-1"} <= told_to_end(cluster)


def test_the_job_stays_as_it_is_for_the_next_coordinator(cluster: Cluster) -> None:
    cluster.carry_out(cluster.core.shut_down(cluster.now))
    for name in list(cluster.processes):
        cluster.kill(name)
    cluster.run(90)
    assert cluster.state() == "training", "who ended as it was told is not lost"


def test_a_coordinator_that_stops_at_the_end_tells_whoever_is_left_and_else_nobody(cluster: Cluster) -> None:
    assert cluster.core.part_with_members() == [], "a restart of the coordinator is nobody's end"
    cluster.carry_out(cluster.core.shut_down(cluster.now))
    effects = cluster.core.part_with_members()
    assert len(effects) == 4
    assert all(isinstance(e, Send) and isinstance(e.message, Orders) and e.message.shutdown for e in effects)
    cluster.carry_out(effects)
    assert len(told_to_end(cluster)) == 4
