"""What follows when a shard that holds a part dies, comes back, or is only late."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from coordinator_fakes import LAYOUT, Cluster, FakeShard, FakeWorker, specification

from paramserver.coordinator.core import CoordinatorCore
from paramserver.coordinator.events import MOST_EVENTS, Events
from paramserver.coordinator.failover import RECOVERY_SECONDS, REPLACE_SECONDS, RETURN_SECONDS, Failover
from paramserver.coordinator.placement import Holder, loads, place
from paramserver.coordinator.sessions import SESSION_SECONDS
from paramserver.protocol.messages import PartReport

BACKED_UP = {"log": "journal", "backups": 1}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path, shards=3)
    yield made
    made.store.close()


def submit(cluster: Cluster, **durability: object) -> None:
    cluster.submit(
        specification(stop={"epochs": 40}, durability={**BACKED_UP, **durability}, cluster={"shards": 3, "workers": 2})
    )


def train(cluster: Cluster) -> None:
    """A job with three parts, each with a backup in step, and workers that do nothing for now."""
    submit(cluster)
    cluster.run(20, until="training")
    cluster.run(1)
    for worker in cluster.workers():
        worker.is_stuck = True
    assert all(part["is_synced"] for part in parts(cluster).values())


def job(cluster: Cluster) -> dict[str, Any]:
    figures = cluster.core.snapshot(cluster.now)["job"]
    assert isinstance(figures, dict)
    return figures


def parts(cluster: Cluster) -> dict[str, dict[str, Any]]:
    return dict(job(cluster)["parts"])


def holders(cluster: Cluster) -> dict[str, tuple[str, str | None]]:
    return {name: (part["shard"], part["backup"]) for name, part in parts(cluster).items()}


def words(cluster: Cluster) -> str:
    return "\n".join(event["text"] for event in job(cluster)["events"])


def start_again(cluster: Cluster, dead: FakeShard, port: int = 2) -> FakeShard:
    """The successor of a killed shard, with what is on its disk."""
    shard = FakeShard(dead.name, 50 + port, port, journal=set(dead.initialised), disk=dead.disk)
    cluster.start(shard)
    return shard


def finish(cluster: Cluster) -> None:
    for worker in cluster.workers():
        worker.is_stuck = False
    cluster.run(200, until="done")


def test_every_part_has_the_next_shard_of_the_ring_as_backup(cluster: Cluster) -> None:
    train(cluster)
    assert holders(cluster) == {
        "shard-0": ("shard-0", "shard-1"),
        "shard-1": ("shard-1", "shard-2"),
        "shard-2": ("shard-2", "shard-0"),
    }
    for shard in map(cluster.shard, ("shard-0", "shard-1", "shard-2")):
        for order in shard.orders.values():
            assert order.partner is not None
            assert order.partner.is_synced
            other = cluster.shard(order.partner.shard)
            assert (order.partner.address, order.partner.incarnation) == (other.address, 1)
            assert other.orders[order.part].role != order.role
    finish(cluster)
    assert cluster.written["job"]["faults"]["failovers"] == 0


def test_a_killed_shards_blocks_are_served_by_its_backup_at_once_and_the_job_goes_on(cluster: Cluster) -> None:
    train(cluster)
    cluster.kill("shard-1")
    cluster.run(SESSION_SECONDS - 0.8)
    assert parts(cluster)["shard-1"]["shard"] == "shard-1", "its session has not ended"
    cluster.run(1.0)
    assert parts(cluster)["shard-1"]["shard"] == "shard-2"
    assert parts(cluster)["shard-1"]["term"] == 2
    assert cluster.shard("shard-2").orders["shard-1"].role == "primary"
    for worker in cluster.workers():
        assert worker.order is not None
        (moved,) = (part for part in worker.order.placement if part.part == "shard-1")
        assert (moved.address, moved.term) == (cluster.shard("shard-2").address, 2)
    assert job(cluster)["failover_seconds"][0] < 0.5
    assert job(cluster)["faults"]["failovers"] == 1
    assert "shard-1 died (it was not heard of for 3." in words(cluster)
    assert "shard-2 serves part shard-1 under term 2" in words(cluster)
    finish(cluster)
    result = cluster.written["job"]
    assert (result["faults"]["failovers"], result["faults"]["shards_recovered"]) == (1, 0)
    assert len(result["failover_seconds"]) == 1


def test_a_primary_goes_on_alone_only_when_that_is_stored_and_ordered(cluster: Cluster) -> None:
    train(cluster)
    cluster.kill("shard-1")  # the backup of part shard-0
    cluster.run(SESSION_SECONDS - 0.8)
    primary = cluster.shard("shard-0")
    assert not primary.push(cluster, "shard-0", 1, 7), "it acknowledged what its backup has not stored"
    cluster.run(1.5)
    assert primary.push(cluster, "shard-0", 1, 7)
    assert primary.orders["shard-0"].partner is None
    assert parts(cluster)["shard-0"]["grants"] == 1
    assert parts(cluster)["shard-0"]["term"] == 1, "the same process serves the same blocks"
    assert "shard-0 goes on without a backup of part shard-0: shard-1 is lost" in words(cluster)


def test_a_shard_that_comes_back_becomes_the_backup_that_is_missing_and_later_serves_again(cluster: Cluster) -> None:
    train(cluster)
    dead = cluster.shard("shard-1")
    cluster.kill("shard-1")
    cluster.run(SESSION_SECONDS + 1)
    start_again(cluster, dead)
    cluster.run(8)
    assert "shard-1 is in step as backup of part shard-0" in words(cluster)
    assert "shard-1 is in step as backup of part shard-1" in words(cluster)
    assert "shard-2 hands part shard-1 to shard-1 under term 3" in words(cluster), "the load is even again"
    assert holders(cluster)["shard-1"] == ("shard-1", "shard-2")
    assert {part["is_synced"] for part in parts(cluster).values()} == {True}
    assert job(cluster)["faults"]["failovers"] == 1
    cluster.run(30)
    assert parts(cluster)["shard-1"]["term"] == 3, "and nothing moves to and fro"
    finish(cluster)


def test_a_lost_backups_place_goes_to_another_shard_when_its_own_does_not_come_back(cluster: Cluster) -> None:
    train(cluster)
    cluster.kill("shard-1")
    cluster.run(SESSION_SECONDS + REPLACE_SECONDS - 1)
    assert holders(cluster)["shard-0"] == ("shard-0", None)
    cluster.run(3)
    assert holders(cluster) == {
        "shard-0": ("shard-0", "shard-2"),
        "shard-1": ("shard-2", "shard-0"),
        "shard-2": ("shard-2", "shard-0"),
    }
    cluster.run(3)
    assert all(part["is_synced"] for part in parts(cluster).values())
    finish(cluster)


def test_a_spare_shard_takes_a_lost_backups_place_at_once(cluster: Cluster) -> None:
    train(cluster)
    cluster.start(FakeShard("spare", 70))
    cluster.run(1)
    cluster.kill("shard-1")
    cluster.run(SESSION_SECONDS + 2)
    assert holders(cluster)["shard-0"] == ("shard-0", "spare")


def test_a_stopped_shard_that_wakes_up_is_a_backup_and_serves_nobody_under_its_old_term(cluster: Cluster) -> None:
    train(cluster)
    sleeper = cluster.shard("shard-1")
    sleeper.is_stopped = True
    cluster.run(SESSION_SECONDS + 1)
    assert parts(cluster)["shard-1"]["shard"] == "shard-2"
    sleeper.is_stopped = False
    assert not sleeper.push(cluster, "shard-1", 1, 5), "its backup does not store for it any more"
    while "shard-1" not in sleeper.orders or sleeper.orders["shard-1"].term == 1:
        assert not sleeper.push(cluster, "shard-1", 1, 6)
        cluster.run(0.1)
    assert sleeper.membership.incarnation == 1, "it is the same process"
    assert (sleeper.orders["shard-1"].role, sleeper.orders["shard-1"].term) == ("backup", 2)
    cluster.run(8)
    assert sleeper.orders["shard-1"].term == 3, "in step again, it serves its part again"
    assert sleeper.push(cluster, "shard-1", 3, 7)
    finish(cluster)


def test_an_unsynced_backup_is_never_promoted_and_the_primary_is_waited_for(cluster: Cluster) -> None:
    train(cluster)
    dead = cluster.shard("shard-1")
    cluster.kill("shard-1")
    cluster.run(SESSION_SECONDS + 1)
    assert holders(cluster)["shard-1"] == ("shard-2", None)
    primary = cluster.shard("shard-2")
    primary.work = lambda cluster: []  # type: ignore[method-assign]  # no backup of it ever catches up
    start_again(cluster, dead)
    cluster.run(2)
    assert holders(cluster)["shard-1"] == ("shard-2", "shard-1")
    cluster.kill("shard-2")
    cluster.run(SESSION_SECONDS + RETURN_SECONDS + 1)
    assert parts(cluster)["shard-1"]["shard"] == "shard-2"
    assert "waiting for shard-2, with the journal of shard-1" in job(cluster)["waiting"]
    start_again(cluster, primary, port=3)
    cluster.run(5)
    finish(cluster)


def test_when_both_died_the_primary_is_waited_for_first(cluster: Cluster) -> None:
    train(cluster)
    primary, backup = cluster.shard("shard-1"), cluster.shard("shard-2")
    cluster.kill("shard-1")
    cluster.kill("shard-2")
    cluster.run(SESSION_SECONDS + 1)
    assert parts(cluster)["shard-1"]["is_synced"], "no grant to a primary that cannot use it"
    assert "waiting for shard-1 or shard-2, with the journal of shard-1" in job(cluster)["waiting"]
    start_again(cluster, backup)
    cluster.run(RETURN_SECONDS - 3)
    assert parts(cluster)["shard-1"]["shard"] == "shard-1"
    start_again(cluster, primary)
    cluster.run(3)
    assert parts(cluster)["shard-1"]["shard"] == "shard-1"
    assert parts(cluster)["shard-1"]["term"] == 2, "another process serves it"
    assert job(cluster)["faults"]["failovers"] == 1, "only that of part shard-0, whose primary lives"
    finish(cluster)


def test_when_both_died_and_only_the_backup_comes_back_it_is_promoted_with_what_is_on_its_disk(
    cluster: Cluster,
) -> None:
    train(cluster)
    assert cluster.shard("shard-1").push(cluster, "shard-1", 1, 7)
    backup = cluster.shard("shard-2")
    cluster.kill("shard-1")
    cluster.kill("shard-2")
    cluster.run(SESSION_SECONDS + 1)
    successor = start_again(cluster, backup)
    cluster.run(RETURN_SECONDS)
    assert parts(cluster)["shard-1"]["shard"] == "shard-2"
    assert successor.disk["shard-1"] == [7]
    finish(cluster)


def test_a_returned_primary_whose_journal_is_unusable_gives_way_to_the_backups_successor(cluster: Cluster) -> None:
    train(cluster)
    primary, backup = cluster.shard("shard-1"), cluster.shard("shard-2")
    cluster.kill("shard-1")
    cluster.kill("shard-2")
    cluster.run(SESSION_SECONDS + 1)
    start_again(cluster, primary).failed = "segment-1.log: damaged at byte 7"
    cluster.run(1)
    assert cluster.state() == "training"
    start_again(cluster, backup)
    cluster.run(RETURN_SECONDS + 1)
    assert parts(cluster)["shard-1"]["shard"] == "shard-2"
    assert "shard-2 takes over part shard-1" in words(cluster)
    assert "damaged at byte 7" in words(cluster)


def test_when_both_died_and_nobody_comes_back_the_job_fails(cluster: Cluster) -> None:
    train(cluster)
    cluster.kill("shard-1")
    cluster.kill("shard-2")
    cluster.run(SESSION_SECONDS + RECOVERY_SECONDS + 2, until="failed")
    assert f"did not come back within {RECOVERY_SECONDS:.0f} s" in cluster.reason()
    assert "start the shard again" in cluster.reason()


def test_a_promoted_shard_that_dies_too_is_waited_for_with_the_journal_it_now_has(cluster: Cluster) -> None:
    train(cluster)
    assert cluster.shard("shard-1").push(cluster, "shard-1", 1, 7)
    cluster.kill("shard-1")
    cluster.run(SESSION_SECONDS + 1)
    second = cluster.shard("shard-2")
    assert second.push(cluster, "shard-1", 2, 8)
    cluster.kill("shard-2")
    cluster.run(SESSION_SECONDS + 2)
    assert "waiting for shard-2" in job(cluster)["waiting"]
    successor = start_again(cluster, second)
    cluster.run(3)
    assert successor.disk["shard-1"] == [7, 8]
    assert parts(cluster)["shard-1"]["term"] == 3
    finish(cluster)


def test_a_backup_that_cannot_hold_a_part_is_replaced_and_the_job_goes_on(cluster: Cluster) -> None:
    train(cluster)
    sick = cluster.shard("shard-1")
    sick.membership.report = lambda: msgspec.structs.replace(
        sick.report(),
        parts=tuple(
            PartReport(part.part, "job", failed="no room on the disk") if part.role == "backup" else part
            for part in sick.report().parts
        ),
    )
    cluster.run(REPLACE_SECONDS + 3)
    assert cluster.state() == "training"
    assert holders(cluster)["shard-0"] == ("shard-0", "shard-2")


def test_a_backup_in_step_that_lost_what_it_stored_holds_its_primary_up_for_a_moment_only(cluster: Cluster) -> None:
    train(cluster)
    cluster.shard("shard-0").push(cluster, "shard-0", 1, 7)
    forgetful = cluster.shard("shard-1")
    forgetful.has_forgotten = {"shard-0"}
    cluster.run(SESSION_SECONDS)
    assert "shard-1 has lost what it stored of part shard-0; shard-0 goes on without" in words(cluster)
    assert parts(cluster)["shard-0"]["grants"] == 1
    assert cluster.shard("shard-0").push(cluster, "shard-0", 1, 8)
    forgetful.has_forgotten = set()
    cluster.run(REPLACE_SECONDS + 3)
    assert parts(cluster)["shard-0"]["is_synced"]
    assert {name for name, part in parts(cluster).items() if part["grants"]} == {"shard-0"}


# --------------------------------------------------------------------- the coordinator is away


@pytest.mark.parametrize("away", [0.5, 20.0])
def test_a_coordinator_that_was_killed_promotes_nobody_while_shards_are_on_their_way_back(
    cluster: Cluster, away: float
) -> None:
    train(cluster)
    cluster.kill_coordinator()
    cluster.run(away)
    cluster.restart_coordinator()
    cluster.run(20)
    assert job(cluster)["faults"]["failovers"] == 0
    assert job(cluster)["faults"]["grants"] == 0
    assert {part["term"] for part in parts(cluster).values()} == {1}
    finish(cluster)


def test_a_shard_that_died_with_the_coordinator_is_replaced_by_its_backup(cluster: Cluster) -> None:
    train(cluster)
    cluster.kill_coordinator()
    cluster.kill("shard-1")
    cluster.run(1)
    cluster.restart_coordinator()
    cluster.run(SESSION_SECONDS + 2)
    assert parts(cluster)["shard-1"]["shard"] == "shard-2"
    assert parts(cluster)["shard-0"]["backup"] is None
    finish(cluster)


def test_a_coordinator_that_was_itself_stopped_declares_nobody_dead(cluster: Cluster) -> None:
    train(cluster)
    cluster.is_coordinator_up = False
    cluster.run(15)
    cluster.is_coordinator_up = True
    cluster.core.extend(15)
    cluster.run(10)
    assert job(cluster)["faults"]["failovers"] == job(cluster)["faults"]["grants"] == 0


def test_what_happened_and_what_was_counted_survive_a_restart_of_the_coordinator(cluster: Cluster) -> None:
    train(cluster)
    cluster.kill("shard-1")
    cluster.run(SESSION_SECONDS + 1)
    before = job(cluster)
    cluster.kill_coordinator()
    cluster.restart_coordinator()
    cluster.run(5)
    after = job(cluster)
    assert after["events"][: len(before["events"])] == before["events"]
    assert after["faults"]["failovers"] == 1
    assert after["parts"]["shard-1"]["term"] == 2


def test_a_restarted_coordinator_takes_what_was_pushed_before_for_no_sudden_rate(cluster: Cluster) -> None:
    train(cluster)
    for name in ("shard-0", "shard-1", "shard-2"):
        cluster.shard(name).bytes_in = 10**9
    cluster.run(10)
    assert job(cluster)["pushed_bytes"] == 3 * 10**9
    cluster.kill_coordinator()
    cluster.restart_coordinator()
    cluster.metrics.clear()
    cluster.run(8)
    assert {line["pushed_bytes_a_second"] for line in cluster.metrics} == {0.0}
    assert job(cluster)["pushed_bytes"] == 3 * 10**9


def test_a_job_that_an_earlier_release_had_placed_fails_with_what_to_do(cluster: Cluster) -> None:
    train(cluster)
    stored = cluster.store.load()
    documents = {"job": {"placed": {"layout": {}, "examples": {}, "term": 1, "shards": []}}}
    core = CoordinatorCore(cluster.now, type(stored)(stored.jobs, documents=documents))
    assert core.jobs["job"].state == "failed"
    assert "earlier release" in core.jobs["job"].reason


# ------------------------------------------------------------------------------------ figures


def test_events_are_bounded_and_say_how_many_are_gone() -> None:
    events = Events()
    for number in range(MOST_EVENTS + 5):
        events.note(number, f"event {number}")
    assert len(events.rows()) == MOST_EVENTS
    assert events.rows()[0]["text"] == "event 5"
    assert events.forgotten == 5


def test_status_says_of_each_part_who_serves_it_and_how_far_its_backup_is_behind(cluster: Cluster) -> None:
    train(cluster)
    cluster.shard("shard-0").push(cluster, "shard-0", 1, 1)
    cluster.run(1)
    part = parts(cluster)["shard-0"]
    assert (part["shard"], part["backup"], part["term"], part["is_synced"]) == ("shard-0", "shard-1", 1, True)
    assert (part["record"], part["lag_records"], part["seconds_away"]) == (2, 0, None)


def test_the_first_placement_evens_out_what_shards_hold_in_both_roles() -> None:
    shards = {name: Holder(name, 1, f"tcp://{name}") for name in ("a", "b", "c")}
    placement = place(LAYOUT, shards, 3, has_backups=True)
    assert [(part.primary.shard, part.backup and part.backup.shard) for part in placement.parts] == [
        ("a", "b"), ("b", "c"), ("c", "a"),
    ]  # fmt: skip
    assert loads(placement.parts, shards) == {"a": 160, "b": 200, "c": 120}


def test_workers_that_join_hear_of_the_present_placement_only(cluster: Cluster) -> None:
    train(cluster)
    cluster.kill("shard-1")
    cluster.run(SESSION_SECONDS + 1)
    joiner = FakeWorker("worker-9", 90)
    cluster.start(joiner)
    cluster.run(1)
    assert joiner.order is not None
    assert {part.address for part in joiner.order.placement} == {"tcp://shard-0:1", "tcp://shard-2:1"}


def test_a_report_about_an_earlier_backup_does_not_make_the_present_one_synced(cluster: Cluster) -> None:
    """The primary says that its backup is in step; meanwhile another one has become its backup."""
    train(cluster)
    run = cluster.core._run
    assert run is not None
    keeper: Failover = run.failover
    session = cluster.core.sessions.get("shard-0")
    assert session is not None
    late = next(part for part in cluster.shard("shard-0").report().parts if part.role == "primary")
    assert late.is_synced
    cluster.kill("shard-1")
    cluster.run(SESSION_SECONDS + REPLACE_SECONDS - 1)
    cluster.shard("shard-0").work = lambda cluster: []  # type: ignore[method-assign]  # it does not catch up
    cluster.run(4)
    part = keeper.part("shard-0")
    assert part is not None
    assert part.backup is not None
    assert part.backup.shard == "shard-2"
    keeper.hear(session, part, late, cluster.now)
    assert not keeper._parts["shard-0"].is_synced
    stale = msgspec.structs.replace(late, partner="shard-2", partner_incarnation=1)
    keeper.hear(session, part, stale, cluster.now)
    assert not keeper._parts["shard-0"].is_synced, "the same process, but an earlier partnership"
    keeper.hear(session, part, msgspec.structs.replace(stale, partner_number=part.partnership), cluster.now)
    assert keeper._parts["shard-0"].is_synced
