"""Where the cluster uses keys, a name and an incarnation belong to the key that carries them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from coordinator_fakes import MODEL, Cluster, FakeWorker

from paramserver.coordinator.core import CoordinatorCore
from paramserver.coordinator.effects import Send
from paramserver.coordinator.sessions import Sessions
from paramserver.protocol.messages import (
    ExportPart,
    Heartbeat,
    Message,
    Orders,
    PartOrder,
    Refusal,
    Register,
    Registered,
    WorkerKey,
    WorkerReport,
)

STRANGER = b"stranger/1"


def key_of(peer: bytes) -> str:
    return f"key of {peer.partition(b'/')[0].decode()}"


class KeyedCluster(Cluster):
    """Every process has a key of its own; `stranger` has a listed key too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.core.key_of = key_of

    def restart_coordinator(self) -> None:
        super().restart_coordinator()
        self.core.key_of = key_of

    def say(self, message: Message, peer: bytes = STRANGER) -> Message:
        """The one answer to a message of a peer."""
        effects = self.core.handle(peer, message, [memoryview(bytes(40))], self.now)
        (answer,) = [effect.message for effect in effects if isinstance(effect, Send) and effect.peer == peer]
        self.carry_out(effects)
        return answer


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KeyedCluster]:
    made = KeyedCluster(tmp_path)
    made.run(1.0)
    yield made
    made.store.close()


def refused(answer: Message) -> bool:
    return isinstance(answer, Refusal) and answer.code == "wrong-key"


def test_live_name_is_not_registered_by_another_key_even_with_its_incarnation_pid_and_host(
    cluster: KeyedCluster,
) -> None:
    worker = cluster.worker("worker-0")
    for incarnation in (0, worker.membership.incarnation, worker.membership.incarnation + 1):
        stolen = Register(role="worker", name="worker-0", incarnation=incarnation, pid=20, host="fake")
        assert refused(cluster.say(stolen))
    assert cluster.core.counts["wrong-key"] == 3
    session = cluster.core.sessions.get("worker-0")
    assert session is not None
    assert session.peer != STRANGER


def test_heartbeat_of_another_key_neither_renews_nor_moves_a_session_and_learns_nothing(cluster: KeyedCluster) -> None:
    worker = cluster.worker("worker-0")
    session = cluster.core.sessions.get("worker-0")
    assert session is not None
    before = (session.peer, session.heard_at, session.number, session.report)
    beat = Heartbeat(name="worker-0", incarnation=worker.membership.incarnation, seen=0, report=WorkerReport(steps=9))
    cluster.now += 0.5
    assert refused(cluster.say(beat))
    assert (session.peer, session.heard_at, session.number, session.report) == before
    assert isinstance(cluster.say(beat, session.peer), Orders)


def test_model_is_not_exported_by_another_key(cluster: KeyedCluster) -> None:
    cluster.submit()
    cluster.run(60.0, until="exporting")
    worker = cluster.worker("worker-0")
    part = ExportPart(
        name=worker.name, incarnation=worker.membership.incarnation, job="job", lease=1, offset=0, total=40
    )
    assert refused(cluster.say(part))
    cluster.run(60.0, until="done")
    assert bytes(cluster.model) == MODEL


def test_job_runs_to_its_end_with_keys_and_every_address_carries_its_shards_key(cluster: KeyedCluster) -> None:
    cluster.submit()
    cluster.run(60.0, until="training")
    order = cluster.worker("worker-0").order
    assert order is not None
    assert {part.part: part.key for part in order.placement} == {
        "shard-0": "key of shard-0",
        "shard-1": "key of shard-1",
    }
    cluster.run(60.0, until="done")
    assert not cluster.core.counts


def shard_workers(cluster: KeyedCluster) -> tuple[WorkerKey, ...]:
    order = cluster.shard("shard-0").order
    assert isinstance(order, PartOrder)
    return order.workers


def test_shards_are_told_at_once_who_the_live_workers_are(cluster: KeyedCluster) -> None:
    for worker in cluster.workers():
        worker.is_stuck = True
    cluster.submit()
    cluster.workers()[0].is_stuck = False
    cluster.run(20.0, until="training")
    for worker in cluster.workers():
        worker.is_stuck = True
    assert shard_workers(cluster) == (
        WorkerKey("worker-0", 1, "key of worker-0"),
        WorkerKey("worker-1", 1, "key of worker-1"),
    )
    joiner = FakeWorker("worker-2", pid=99)
    joiner.is_stuck = True
    cluster.start(joiner)
    cluster.run(0.3)  # less than two heartbeats
    assert WorkerKey("worker-2", 1, "key of worker-2") in shard_workers(cluster)
    cluster.kill("worker-0")
    cluster.run(cluster.core.sessions.session_seconds + 0.5)
    assert "worker-0" not in {known.worker for known in shard_workers(cluster)}


def test_restarted_coordinator_keeps_incarnations_and_for_a_while_names_for_their_keys(cluster: KeyedCluster) -> None:
    incarnation = cluster.worker("worker-0").membership.incarnation
    cluster.kill_coordinator()
    cluster.restart_coordinator()
    for stolen in (incarnation, 0):
        assert refused(cluster.say(Register(role="worker", name="worker-0", incarnation=stolen)))
    cluster.run(3.0)  # its own process comes back
    session = cluster.core.sessions.get("worker-0")
    assert session is not None
    assert (session.key, session.incarnation) == ("key of worker-0", incarnation)


def test_name_of_a_dead_process_may_be_carried_by_another_key_but_not_its_incarnation(cluster: KeyedCluster) -> None:
    incarnation = cluster.worker("worker-0").membership.incarnation
    cluster.kill("worker-0")
    cluster.run(cluster.core.sessions.session_seconds + 1.0)
    assert refused(cluster.say(Register(role="worker", name="worker-0", incarnation=incarnation)))
    answer = cluster.say(Register(role="worker", name="worker-0"))
    assert isinstance(answer, Registered)
    assert answer.incarnation == incarnation + 1


def test_without_keys_nothing_is_bound_to_the_keys_of_an_earlier_run() -> None:
    sessions = Sessions({"w": 3}, keys={"w": "a key"})
    answer = sessions.register(b"p", Register(role="worker", name="w"), 0.1)
    assert isinstance(answer, Registered)


def test_keys_of_names_survive_a_restart(cluster: KeyedCluster) -> None:
    cluster.kill_coordinator()
    cluster.restart_coordinator()
    stored = cluster.store.load()
    assert stored.keys is not None
    assert stored.keys["shard-1"] == "key of shard-1"
    assert CoordinatorCore(0.0, stored).sessions.keys == dict(stored.keys)


def test_status_shows_the_key_of_every_session(cluster: KeyedCluster) -> None:
    shown = {session["name"]: session["key"] for session in cluster.core.snapshot(cluster.now)["sessions"]}
    assert shown["worker-1"] == "key of worker-1"
