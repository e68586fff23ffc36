"""A job's life, driven with scripted shards and workers on an injected clock."""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from coordinator_fakes import EXAMPLES, LAYOUT, MODEL, Cluster, FakeShard, FakeWorker, specification

from paramserver.coordinator.core import EndedJobError, UnknownJobError
from paramserver.coordinator.effects import Send
from paramserver.coordinator.store import FILE_NAME
from paramserver.job import Cluster as Needs
from paramserver.protocol.layout import Block, Layout, Parameter, cut_layout
from paramserver.protocol.messages import (
    ExportPart,
    Heartbeat,
    LeaseDone,
    Orders,
    PartReport,
    Refusal,
    ShardReport,
    StalenessRow,
    Tick,
    WorkerOrder,
    WorkerReport,
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.store.close()


def trained(workers: list[FakeWorker]) -> Counter[tuple[int, int]]:
    return Counter(
        (lease.epoch, example)
        for worker in workers
        for lease in worker.log
        if lease.kind == "train"
        for example in lease.examples
    )


def test_job_runs_from_queue_to_done_and_every_example_is_trained_once(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 2}))
    cluster.run(30, until="done")
    expected = {(epoch, example) for epoch in (0, 1) for example in range(EXAMPLES["train"])}
    assert trained(cluster.workers()) == dict.fromkeys(expected, 1)
    assert bytes(cluster.model) == MODEL
    assert cluster.sealed == ["job"]
    result = cluster.written["job"]
    assert result["state"] == "done"
    assert result["examples"] == 80
    assert result["examples_repeated"] == 0
    assert result["steps"] == 40
    assert result["valid"]["loss"] == pytest.approx(2.0)
    assert result["test"]["bits"] == pytest.approx(2.0 / math.log(2))
    assert result["test"]["perplexity"] == pytest.approx(math.exp(2.0))
    assert result["train"]["metrics"] == {"accuracy": 0.5}, "of the last steps"
    for evaluated in (result, result["replica"]):
        assert evaluated["valid"]["metrics"] == evaluated["test"]["metrics"] == {"accuracy": 0.75}
    assert (result["unit"], result["symbol"]) == ("bits", "character")
    assert result["staleness"]["all"]["mean"] == pytest.approx(8 / 14)
    assert set(result["seconds_by_state"]) >= {"initialising", "training", "draining", "evaluating", "exporting"}
    json.dumps(result, allow_nan=False)
    assert all(process.order is None for process in cluster.processes.values())


def test_a_lease_is_as_long_as_the_family_says(cluster: Cluster) -> None:
    data = {"name": "digits", "batch": 3, "batches": 4}
    cluster.submit(specification(model={"family": "mlp"}, data=data))
    cluster.run(30, until="done")
    leases = [lease for worker in cluster.workers() for lease in worker.log if lease.kind == "train"]
    assert sorted(len(lease.examples) for lease in leases) == [4, 12, 12, 12]
    assert (cluster.written["job"]["unit"], cluster.written["job"]["symbol"]) == ("nats", "image")


def test_metrics_are_written_about_once_a_second_while_a_job_runs(cluster: Cluster) -> None:
    cluster.run(5)
    assert not cluster.metrics
    cluster.submit(specification(stop={"epochs": 8}))
    cluster.run(60, until="done")
    seconds = [line["seconds"] for line in cluster.metrics]
    assert len(seconds) >= 4
    assert all(0.9 < after - before < 1.3 for before, after in pairwise(seconds[:-1]))


def test_job_waits_for_enough_members_and_says_so(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, workers=1)
    cluster.submit()
    cluster.run(5)
    assert cluster.state() == "queued"
    assert "workers (1 of 2 are here)" in cluster.core.snapshot(cluster.now)["queue"][0]["waiting"]
    cluster.start(FakeWorker("worker-1", 30))
    cluster.run(30, until="done")
    cluster.store.close()


def test_job_that_needs_more_than_is_here_warns_and_one_that_does_not_is_silent(cluster: Cluster) -> None:
    cluster.run(1)
    assert cluster.core.shortage(Needs(shards=2, workers=2)) == ""
    assert "2 shards and 2 workers, the job needs 1000 and 1" in cluster.core.shortage(Needs(shards=1000, workers=1))


def test_result_holds_the_refusals_of_its_own_time_only(cluster: Cluster) -> None:
    cluster.carry_out(cluster.core.malformed(b"stranger", "noise"))
    first, second = cluster.submit(), cluster.submit()
    cluster.run(20, until="training", job_id=first)
    cluster.carry_out(cluster.core.malformed(b"stranger", "noise"))
    cluster.carry_out(cluster.core.malformed(b"stranger", "noise"))
    cluster.run(60, until="done", job_id=second)
    assert cluster.written[first]["refusals"]["coordinator"] == {"malformed": 2}
    assert cluster.written[second]["refusals"]["coordinator"] == {}


def test_jobs_run_one_at_a_time_first_in_first_out(cluster: Cluster) -> None:
    first, second = cluster.submit(), cluster.submit()
    assert (first, second) == ("job", "job-2")
    while cluster.state(first) != "done":
        assert cluster.state(second) == "queued"
        cluster.run(0.1)
    cluster.run(30, until="done", job_id=second)


def test_stop_steps_ends_training_before_the_epochs(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 50, "steps": 11}))
    cluster.run(60, until="done")
    assert 11 <= cluster.written["job"]["steps"] <= 14


def test_more_shards_than_blocks_fails_the_job(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, shards=4)
    cluster.submit(specification(cluster={"shards": 4, "workers": 2}))
    cluster.run(10, until="failed")
    assert "more shards than blocks" in cluster.reason()
    cluster.store.close()


def test_members_are_the_workers_that_hold_training_leases(cluster: Cluster) -> None:
    cluster.submit()
    cluster.run(30, until="done")
    assert ("worker-0", "worker-1") in cluster.members
    assert () in cluster.members


def test_dead_worker_leaves_the_members_of_the_shards_order(cluster: Cluster) -> None:
    cluster.worker("worker-1").is_stuck = True
    cluster.submit(specification(stop={"epochs": 20}))
    cluster.run(5, until="training")
    cluster.run(1)
    cluster.kill("worker-1")
    cluster.run(4)
    order = cluster.shard("shard-0").order
    assert order is not None
    assert [member.worker for member in order.members] == ["worker-0"]


def test_dead_workers_examples_are_done_by_the_others_and_those_that_it_had_begun_are_counted(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 8}))
    cluster.run(5, until="training")
    victim = cluster.worker("worker-1")
    cluster.run(0.5)
    victim.is_stuck = True
    cluster.run(1)
    (begun,) = victim.begun
    assert len(victim.held) > 1
    repeated = len(victim.held[begun].examples)
    cluster.kill("worker-1")
    cluster.run(60, until="done")
    result = cluster.written["job"]
    assert result["examples_repeated"] == repeated
    assert result["workers_lost"] == ["worker-1"]
    counts = trained([cluster.worker("worker-0"), victim])
    assert len(counts) == 8 * EXAMPLES["train"]
    assert set(counts.values()) == {1}


def test_worker_that_was_given_up_and_comes_back_forgets_the_leases_that_others_have_now(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 20}))
    cluster.run(20, until="training")
    cluster.run(1)
    away = cluster.worker("worker-0")
    had, begun = set(away.held), set(away.begun)
    assert had > begun
    del cluster.processes["worker-0"]
    cluster.run(cluster.core.sessions.session_seconds + 2)
    away.is_stuck = True  # it ends nothing, so that what it holds now is what it was told
    cluster.start(away)
    cluster.run(5)
    assert set(away.held) & had == begun, "what it had not begun takes the room of new leases"
    assert set(away.held) - had, "it got new ones"
    assert 0 < cluster.core.counts["stale-lease"] <= len(had), "a lease counts once, not with every heartbeat"
    away.is_stuck = False
    cluster.run(60, until="done")


@pytest.mark.parametrize("is_return_heard", [True, False])
def test_lease_that_a_leaving_worker_had_begun_is_counted_as_repeated_and_no_other(
    cluster: Cluster, is_return_heard: bool
) -> None:
    cluster.submit(specification(stop={"epochs": 8}))
    cluster.run(5, until="training")
    leaver = cluster.worker("worker-1")
    leaver.is_stuck = True
    cluster.run(1)
    (begun,) = leaver.begun
    assert len(leaver.held) > 1
    repeated = len(leaver.held[begun].examples)
    returned = tuple(leaver.held) if is_return_heard else ()
    heartbeat(cluster, leaver.name, WorkerReport(job="job", stage="drain", returned=returned, begun=(begun,)))
    cluster.kill("worker-1")
    cluster.run(60, until="done")
    assert cluster.written["job"]["examples_repeated"] == repeated


def test_job_without_workers_waits_and_goes_on_with_a_new_one(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 4}))
    cluster.run(5, until="training")
    cluster.kill("worker-0")
    cluster.kill("worker-1")
    cluster.run(10)
    assert cluster.state() == "training"
    job = cluster.core.snapshot(cluster.now)["job"]
    assert job["waiting"] == "waiting for workers: none is alive"
    cluster.start(FakeWorker("worker-0", 99))
    cluster.run(60, until="done")


def test_initialise_lease_goes_to_another_worker_when_its_holder_dies(cluster: Cluster) -> None:
    cluster.worker("worker-0").is_stuck = True
    cluster.submit()
    cluster.run(2)
    assert cluster.state() == "initialising"
    cluster.kill("worker-0")
    cluster.run(30, until="done")


def test_export_begins_anew_when_its_holder_dies(cluster: Cluster) -> None:
    cluster.submit()
    cluster.run(30, until="exporting")
    cluster.run(0.1)
    assert 0 < len(cluster.model) < len(MODEL)
    cluster.kill("worker-0")
    cluster.run(30, until="done")
    assert bytes(cluster.model) == MODEL


@pytest.mark.parametrize("state", ["initialising", "training", "evaluating", "exporting"])
def test_dead_shard_fails_the_job_with_what_died_and_what_to_do(cluster: Cluster, state: str) -> None:
    cluster.submit(specification(stop={"epochs": 3}))
    if state == "initialising":
        cluster.worker("worker-0").is_stuck = True
        cluster.run(2)
    else:
        cluster.run(30, until=state)
    for worker in cluster.workers():
        worker.is_stuck = True
    cluster.kill("shard-1")
    cluster.run(5, until="failed")
    assert "'shard-1' died" in cluster.reason()
    assert "submit the job again" in cluster.reason()
    assert cluster.written["job"]["state"] == "failed"


def test_shard_that_lost_its_values_fails_the_job(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 9}))
    cluster.run(30, until="training")
    cluster.shard("shard-0").initialised.clear()
    cluster.run(5, until="failed")
    assert "lost their values" in cluster.reason()


def test_next_job_runs_after_a_failed_one(cluster: Cluster) -> None:
    cluster.submit()
    second = cluster.submit()
    cluster.worker("worker-0").failed = "no data here"
    cluster.run(10, until="failed")
    assert "no data here" in cluster.reason()
    cluster.worker("worker-0").failed = ""
    cluster.run(60, until="done", job_id=second)


@pytest.mark.parametrize("state", ["queued", "initialising", "training", "evaluating", "exporting"])
def test_job_is_cancelled_in_any_state(cluster: Cluster, state: str) -> None:
    cluster.submit(specification(stop={"epochs": 3}))
    if state != "queued":
        cluster.run(30, until=state)
    cluster.carry_out(cluster.core.cancel("job", cluster.now))
    assert cluster.state() == "cancelled"
    assert cluster.written["job"]["state"] == "cancelled"
    cluster.run(2)
    assert all(process.order is None for process in cluster.processes.values())


def test_cancelling_a_waiting_job_leaves_the_running_one_alone(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 3}))
    second = cluster.submit()
    cluster.run(10, until="training")
    cluster.carry_out(cluster.core.cancel(second, cluster.now))
    cluster.run(30, until="done")
    assert cluster.written["job"]["examples_repeated"] == 0


def test_cancel_of_unknown_and_ended_jobs_is_an_error(cluster: Cluster) -> None:
    with pytest.raises(UnknownJobError):
        cluster.core.cancel("nope", cluster.now)
    cluster.submit()
    cluster.run(30, until="done")
    with pytest.raises(EndedJobError, match="done already"):
        cluster.core.cancel("job", cluster.now)


def test_export_called_done_without_its_bytes_fails_the_job(cluster: Cluster) -> None:
    cluster.submit()
    cluster.run(30, until="exporting")
    for worker in cluster.workers():
        worker.is_stuck = True
    cluster.run(1)
    holder = next(worker for worker in cluster.workers() if worker.held)
    done = tuple(LeaseDone(number) for number in holder.held)
    holder.held.clear()
    heartbeat(cluster, holder.name, WorkerReport(job="job", stage="export", done=done))
    assert cluster.state() == "failed"
    assert "before its bytes had arrived" in cluster.reason()


def counting(report: ShardReport) -> ShardReport:
    """The same with 1,000 updates in each part."""
    return ShardReport(tuple([msgspec.structs.replace(part, updates=1000) for part in report.parts]))


def test_result_holds_what_the_shards_counted_last(cluster: Cluster) -> None:
    """Training may end within one heartbeat of a shard: its last updates belong to the result."""
    cluster.submit()
    cluster.run(30, until="draining")
    for name in ("shard-0", "shard-1"):
        shard = cluster.shard(name)
        earlier = shard.membership.report
        shard.membership.report = lambda earlier=earlier: counting(earlier())
    cluster.run(30, until="done")
    assert {shard["updates"] for shard in cluster.core.snapshot(cluster.now)["job"]["parts"].values()} == {1000}


# ------------------------------------------------------------------------------------ restarts


@pytest.mark.parametrize("away", [0.2, 20.0])
@pytest.mark.parametrize("state", ["initialising", "training", "draining", "evaluating", "exporting"])
def test_job_goes_on_after_the_coordinator_was_killed(cluster: Cluster, state: str, away: float) -> None:
    cluster.submit(specification(stop={"epochs": 3}))
    cluster.run(30, until=state)
    cluster.run(0.4)
    orders = {shard.name: shard.order for shard in (cluster.shard("shard-0"), cluster.shard("shard-1"))}
    cluster.kill_coordinator()
    cluster.run(away)
    cluster.restart_coordinator()
    cluster.run(2)
    for name, order in orders.items():
        now = cluster.shard(name).order
        if order is not None and now is not None:
            assert (now.term, now.blocks) == (order.term, order.blocks), "the placement changed"
    cluster.run(60, until="done")
    assert set(trained(cluster.workers()).values()) == {1}
    assert len(trained(cluster.workers())) == 3 * EXAMPLES["train"]
    assert cluster.written["job"]["examples_repeated"] == 0
    assert cluster.written["job"]["valid"]["metrics"] == {"accuracy": 0.75}
    assert bytes(cluster.model) == MODEL


def test_worker_that_died_with_the_coordinator_has_its_leases_granted_again(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 3}))
    cluster.run(30, until="training")
    victim = cluster.worker("worker-1")
    victim.is_stuck = True
    cluster.run(1)
    assert victim.held
    cluster.kill_coordinator()
    cluster.kill("worker-1")
    cluster.run(1)
    cluster.restart_coordinator()
    cluster.run(60, until="done")
    assert len(trained([cluster.worker("worker-0"), victim])) == 3 * EXAMPLES["train"]
    assert cluster.written["job"]["examples_repeated"] > 0


def test_shard_that_died_with_the_coordinator_fails_the_job(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 3}))
    cluster.run(30, until="training")
    cluster.kill_coordinator()
    cluster.kill("shard-0")
    for worker in cluster.workers():
        worker.is_stuck = True
    cluster.restart_coordinator()
    cluster.run(15, until="failed")
    assert "did not come back" in cluster.reason()


def test_new_process_under_a_placed_shards_name_fails_the_job(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 3}))
    cluster.run(30, until="training")
    cluster.kill_coordinator()
    cluster.kill("shard-0")
    cluster.start(FakeShard("shard-0", 77))
    cluster.restart_coordinator()
    cluster.run(5, until="failed")
    assert "another process took its name" in cluster.reason()


@pytest.mark.parametrize("state", ["queued", "training"])
@pytest.mark.parametrize(
    ("found", "instead", "named"),
    [
        ('"batch": 4', '"batch": "four"', "data.batch"),
        ('"recurrent"', '"uninstalled"', "unknown family 'uninstalled'"),
        ('"cluster"', '"clutter"', "unknown field"),
        ("{", "", "Extra data"),
    ],
)
def test_stored_job_that_is_no_job_any_more_fails_and_the_next_one_runs(
    cluster: Cluster, state: str, found: str, instead: str, named: str
) -> None:
    first = cluster.submit(specification(stop={"epochs": 40}))
    cluster.run(30, until="training")
    other = cluster.submit() if state == "queued" else first
    last = cluster.submit()
    cluster.kill_coordinator()
    record = cluster.core.jobs[other]
    assert record.state == state
    broken = record.specification.replace(found, instead, 1)
    assert broken != record.specification
    with sqlite3.connect(cluster.folder / f"state-{cluster.restarts}" / FILE_NAME) as store:
        store.execute("UPDATE jobs SET specification = ? WHERE id = ?", (broken, other))
    store.close()
    cluster.restart_coordinator()
    cluster.run(60, until="done", job_id=last)
    assert cluster.state(other) == "failed"
    assert named in cluster.reason(other)
    assert "submit the job again" in cluster.reason(other)
    result = cluster.written[other]
    assert result["state"] == "failed"
    assert result.keys() == cluster.written[last].keys()
    json.dumps(result, allow_nan=False)
    assert cluster.core.job_detail(other)["result"] == result


def test_queue_ids_and_results_survive_a_kill(cluster: Cluster) -> None:
    cluster.submit()
    cluster.run(30, until="done")
    cluster.kill("worker-0")
    cluster.run(5)
    second = cluster.submit()
    cluster.kill_coordinator()
    cluster.restart_coordinator()
    assert cluster.core.job_detail("job")["result"]["examples"] == 40
    assert cluster.state(second) == "queued"
    assert cluster.core.unused_id("job", lambda candidate: False) == "job-3"
    cluster.start(FakeWorker("worker-0", 50))
    cluster.run(30, until="done", job_id=second)


# ------------------------------------------------------------------------------ grants and loss


def test_grant_is_repeated_until_it_was_seen(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 9}))
    cluster.run(10, until="training")
    worker = cluster.worker("worker-0")
    worker.is_stuck = True
    cluster.run(1)
    worker.held.clear()
    core, now = cluster.core, cluster.now
    silent = Heartbeat(
        name="worker-0",
        incarnation=worker.membership.incarnation,
        seen=worker.membership.seen,
        report=WorkerReport(job="job", stage="train"),
    )

    def grants() -> set[int]:
        effects = core.handle(b"p", silent, [], now)
        (orders,) = [e.message for e in effects if isinstance(e, Send) and e.peer == b"p"]
        assert isinstance(orders, Orders)
        assert isinstance(orders.order, WorkerOrder)
        return {lease.number for lease in orders.order.grants}

    first = grants()
    assert first
    assert grants() == first
    # Seen, and neither held nor done: free again, and granted under other numbers.
    session = core.sessions.get("worker-0")
    assert session is not None
    silent = Heartbeat(
        name="worker-0", incarnation=worker.membership.incarnation, seen=session.number, report=silent.report
    )
    assert grants().isdisjoint(first)


def test_reported_results_are_counted_once_and_confirmed_each_time(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 9}))
    cluster.run(10, until="training")
    worker = cluster.worker("worker-0")
    worker.is_stuck = True
    cluster.run(1)
    number = next(iter(worker.held))
    done = LeaseDone(number, steps=2, elements=8, loss_sum=1.0)
    report = WorkerReport(job="job", stage="train", held=tuple(worker.held.keys() - {number}), done=(done,))
    beat = Heartbeat(name="worker-0", incarnation=worker.membership.incarnation, seen=0, report=report)
    run = cluster.core._run
    assert run is not None
    before = run.leasing.sums["train"]["leases"] if run.leasing.sums else 0
    for _ in range(3):
        effects = cluster.core.handle(b"p", beat, [], cluster.now)
        assert any(
            isinstance(e, Send) and isinstance(e.message, Orders) and e.message.confirmed == (number,) for e in effects
        )
    assert run.leasing.sums["train"]["leases"] == before + 1


def test_surplus_is_handed_back_so_that_no_worker_idles_near_the_end(cluster: Cluster) -> None:
    """A worker that is slow from some moment on does not keep the heap that it was granted while fast."""
    cluster.submit(specification(stop={"epochs": 40}))
    cluster.run(20, until="training")
    cluster.run(8)
    assert len(cluster.worker("worker-1").held) > 10
    cluster.worker("worker-1").is_stuck = True
    cluster.run(60)
    assert cluster.state() == "training"
    assert len(cluster.worker("worker-1").held) <= 2
    cluster.worker("worker-1").is_stuck = False
    cluster.run(60, until="done")
    assert cluster.written["job"]["examples_repeated"] == 0


# ------------------------------------------------------------------------------ bad peers


def heartbeat(cluster: Cluster, name: str, report: ShardReport | WorkerReport) -> list[object]:
    process = cluster.processes[name]
    beat = Heartbeat(name=name, incarnation=process.membership.incarnation, seen=0, report=report)
    return list(cluster.core.handle(b"evil", beat, [], cluster.now))


def test_unknown_sender_is_told_to_register(cluster: Cluster) -> None:
    beat = Heartbeat(name="ghost", incarnation=1, seen=0, report=WorkerReport())
    (effect,) = cluster.core.handle(b"p", beat, [], cluster.now)
    assert isinstance(effect, Send)
    assert isinstance(effect.message, Refusal)
    assert effect.message.code == "unknown-session"


def test_messages_of_the_data_plane_are_not_served(cluster: Cluster) -> None:
    (effect,) = cluster.core.handle(b"p", Tick(job="j", worker="w", incarnation=1, step=1), [], cluster.now)
    assert isinstance(effect, Send)
    assert isinstance(effect.message, Refusal)
    assert effect.message.code == "not-served"
    assert cluster.core.counts["not-served"] == 1


def test_malformed_bytes_are_refused_and_counted(cluster: Cluster) -> None:
    (effect,) = cluster.core.malformed(b"p", "no message")
    assert isinstance(effect, Send)
    assert isinstance(effect.message, Refusal)
    assert effect.message.code == "malformed"
    assert cluster.core.snapshot(cluster.now)["refusals"]["malformed"] == 1


def test_nonsense_in_reports_is_counted_and_kills_neither_coordinator_nor_job(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 3}))
    cluster.run(20, until="training")
    nan = float("nan")
    heartbeat(cluster, "worker-0", ShardReport())
    heartbeat(cluster, "shard-0", ShardReport((PartReport("shard-0", "job", term=9, blocks=1),)))
    too_many = PartReport("shard-0", "job", term=1, blocks=10**6, initialised_blocks=10**7)
    heartbeat(cluster, "shard-0", ShardReport((too_many,)))
    rows = (StalenessRow("w", "g", (1,) * 4000, 2**61),)
    placed = cluster.shard("shard-0").order
    assert placed is not None
    blocks = len(placed.blocks)
    absurd = PartReport("shard-0", "job", term=1, blocks=blocks, initialised_blocks=blocks, staleness=rows)
    heartbeat(cluster, "shard-0", ShardReport((absurd,), waiting_seconds=nan))
    done = (LeaseDone(2**61), LeaseDone(1, loss_sum=nan))
    report = WorkerReport(
        job="job",
        stage="train",
        steps=1,
        loss=nan,
        residual_norm=math.inf,
        finished_examples=1e308,
        done=done,
        metrics={"accuracy": nan},
    )
    heartbeat(cluster, "worker-1", report)
    assert None not in cluster.core.snapshot(cluster.now)["job"]["metrics"].values(), "what is no number is left out"
    assert cluster.core.counts["malformed"] == 1
    assert cluster.core.counts["inconsistent-report"] == 2
    assert cluster.core.counts["unknown-lease"] == 2
    json.dumps(cluster.core.snapshot(cluster.now), allow_nan=False)
    cluster.run(60, until="done")


def test_loss_that_is_not_finite_finishes_the_lease_and_stays_out_of_the_sums(cluster: Cluster) -> None:
    cluster.worker("worker-1").loss_sum = float("nan")
    cluster.submit()
    cluster.run(30, until="done")
    assert cluster.core.counts["not-finite-result"] > 0
    assert cluster.written["job"]["valid"]["loss"] == pytest.approx(2.0)
    assert any("not finite" in warning for warning in cluster.written["job"]["warnings"])


@pytest.mark.parametrize(
    ("layout", "examples", "text"),
    [
        (Layout((Parameter("a", (4,), "g"),), (Block(0, "a", 1, 4, "g"),)), EXAMPLES, "no contiguous cut"),
        (LAYOUT, {"train": -3}, "allowed are"),
        (LAYOUT, {"valid": 3}, "no example"),
    ],
)
def test_declaration_that_no_model_has_fails_the_job_with_the_reason(
    cluster: Cluster, layout: Layout, examples: dict[str, int], text: str
) -> None:
    cluster.worker("worker-0").layout = layout
    cluster.worker("worker-0").examples = examples
    cluster.submit()
    cluster.run(10, until="failed")
    assert text in cluster.reason()


def test_second_initialiser_with_another_model_fails_the_job(cluster: Cluster) -> None:
    cluster.shard("shard-1").report = ShardReport  # type: ignore[method-assign]
    cluster.shard("shard-1").membership.report = ShardReport
    cluster.worker("worker-1").layout = cut_layout([Parameter("other", (4,), "g"), Parameter("b", (4,), "g")])
    cluster.submit()
    cluster.run(2)
    assert cluster.state() == "initialising"
    cluster.kill("worker-0")
    cluster.run(10, until="failed")
    assert "another model" in cluster.reason()


def test_export_parts_out_of_order_or_without_the_lease_are_not_stored(cluster: Cluster) -> None:
    cluster.submit()
    cluster.run(30, until="exporting")
    for worker in cluster.workers():
        worker.is_stuck = True
    cluster.run(1)
    holder = next(worker for worker in cluster.workers() if worker.held)
    (lease,) = holder.held

    def part(name: str, offset: int, lease: int = lease) -> list[object]:
        message = ExportPart(
            name=name,
            incarnation=cluster.processes[name].membership.incarnation,
            job="job",
            lease=lease,
            offset=offset,
            total=100,
        )
        return list(cluster.core.handle(b"p", message, [memoryview(bytes(40))], cluster.now))

    other = next(worker.name for worker in cluster.workers() if worker is not holder)
    stored = cluster.core._run.export.stored if cluster.core._run else 0
    part(other, stored)
    part(holder.name, stored + 1)
    part(holder.name, stored, lease=0)
    part(holder.name, 90)
    assert cluster.core._run is not None
    assert cluster.core._run.export.stored == stored
    for worker in cluster.workers():
        worker.is_stuck = False
    cluster.run(30, until="done")
    assert bytes(cluster.model) == MODEL
