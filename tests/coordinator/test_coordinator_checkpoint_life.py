"""A run that goes on from a checkpoint, and one that is taken, through the coordinator's whole core."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from coordinator_fakes import EXAMPLES, LAYOUT, Cluster, FakeWorker, specification

from paramserver.coordinator.checkpoints.resume import KeptOwn, ResumedFrom, to_document
from paramserver.coordinator.core import EndedJobError, UnknownJobError
from paramserver.coordinator.effects import Effect, SendBlock, SendState
from paramserver.protocol.messages import CheckpointPiece, Message, TakeBlock, TakeState
from paramserver.router.leases import LeaseBook


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.store.close()


def document(done: int = 3, begun: int = 1, **changes: Any) -> dict[str, Any]:
    """A checkpoint after so many leases of two steps each; some more are begun, and one is granted."""
    book = LeaseBook(batch=4, epochs=1, seed=0)
    book.declare(EXAMPLES)
    leases = book.grant("train", "w", done + begun + 1)
    for lease in leases[:done]:
        book.finish("w", lease.number)
    book.begin("w", [lease.number for lease in leases[done : done + begun]])
    train = {"leases": done, "examples": 4 * done, "steps": 2 * done, "elements": 16 * done, "loss_sum": 32.0 * done}
    fields: dict[str, Any] = {
        "folder": "/runs/job/checkpoints/6",
        "place": "job/6",
        "number": 6,
        "layout": LAYOUT,
        "examples": EXAMPLES,
        "leases": book.cut(),
        "sums": {"train": {**train, "skipped_steps": 0}},
        "metric_sums": {"train": {}},
        "workers": {"worker-0": KeptOwn(9.0, 0.0), "worker-7": KeptOwn(16.0, 0.0)},
    }
    return to_document(ResumedFrom(**{**fields, **changes}))


def submit(cluster: Cluster, resume: dict[str, Any], text: str | None = None) -> None:
    effects = cluster.core.submit("job", text or specification(), [], "today", cluster.now, resume)
    cluster.carry_out(effects)


def restore(cluster: Cluster) -> None:
    """What the shards do: they take every block of theirs from the checkpoint."""
    for process in cluster.processes.values():
        order = getattr(process, "order", None)
        if process.role == "shard" and order is not None and order.resumes:
            process.initialised = set(order.blocks)  # type: ignore[union-attr]


def run(cluster: Cluster, seconds: float, until: str) -> None:
    for _ in range(int(seconds * 10)):
        if cluster.state() == until:
            return
        cluster.run(0.1)
        restore(cluster)
    assert cluster.state() == until, cluster.reason()


def ask(cluster: Cluster, process: Any, message: Message, frames: list[memoryview] | None = None) -> list[Effect]:
    peer = f"{process.name}/{id(process)}".encode()
    effects = cluster.core.handle(peer, message, frames or [], cluster.now)
    cluster.store.save(effects)
    return effects


def trained(workers: list[FakeWorker]) -> Counter[int]:
    return Counter(
        example for worker in workers for lease in worker.log if lease.kind == "train" for example in lease.examples
    )


def test_a_run_goes_on_where_the_checkpoint_was_and_initialises_nothing(cluster: Cluster) -> None:
    submit(cluster, document())
    run(cluster, 60, "done")
    assert not [lease for worker in cluster.workers() for lease in worker.log if lease.kind == "initialise"]
    counts = trained(cluster.workers())
    assert set(counts.values()) == {1}
    assert sum(counts.values()) == EXAMPLES["train"] - 12
    result = cluster.written["job"]
    assert (result["steps"], result["examples"], result["examples_repeated"]) == (20, 40, 4)
    assert (result["resumed_from"], result["checkpoints"]) == ("job/6", [])
    # Nobody asked: the residuals of both are lost.
    assert (result["residuals_lost"], result["residuals_lost_norm"]) == (2, 5.0)
    assert result["valid"]["loss"] == pytest.approx(2.0)


def test_a_coordinator_that_restarts_goes_on_with_the_resumed_run(cluster: Cluster) -> None:
    submit(cluster, document())
    run(cluster, 60, "training")
    worker = cluster.worker("worker-0")
    take = TakeState(name="worker-0", incarnation=worker.membership.incarnation, job="job", offset=0)
    (sent,) = [effect for effect in ask(cluster, worker, take) if isinstance(effect, SendState)]
    assert sent.worker == "worker-0"
    cluster.kill_coordinator()
    cluster.restart_coordinator()
    run(cluster, 60, "done")
    result = cluster.written["job"]
    assert set(trained(cluster.workers()).values()) <= {1, 2}
    assert result["examples"] == 40
    assert (result["residuals_lost"], result["residuals_lost_norm"]) == (1, 4.0), "worker-0 has its own, it is known"


def test_a_predecessors_state_is_offered_to_its_namesake_and_to_one_incarnation_of_it(cluster: Cluster) -> None:
    submit(cluster, document())
    run(cluster, 60, "training")
    worker, other = cluster.worker("worker-0"), cluster.worker("worker-1")
    assert worker.order is not None
    assert other.order is not None
    assert (worker.order.resumes, other.order.resumes) == (True, False)

    def given(process: FakeWorker, incarnation: int) -> list[str]:
        message = TakeState(name=process.name, incarnation=incarnation, job="job", offset=0)
        return [effect.worker for effect in ask(cluster, process, message) if isinstance(effect, SendState)]

    assert given(other, other.membership.incarnation) == [""]
    assert given(worker, worker.membership.incarnation) == ["worker-0"]
    assert given(worker, worker.membership.incarnation) == ["worker-0"]
    assert given(worker, worker.membership.incarnation + 1) == [], "of whom there is no session"


def test_blocks_are_given_to_the_shard_that_they_are_placed_on(cluster: Cluster) -> None:
    submit(cluster, document())
    cluster.run(2)
    shard = cluster.shard("shard-0")
    assert shard.order is not None
    assert shard.order.resumes
    own, others = shard.order.blocks[0], next(i for i in range(3) if i not in shard.order.blocks)
    fields = {"name": "shard-0", "incarnation": shard.membership.incarnation, "job": "job", "part": "shard-0"}
    sent = ask(cluster, shard, TakeBlock(**fields, block=own))
    assert [effect.block for effect in sent if isinstance(effect, SendBlock)] == [own]
    assert not [e for e in ask(cluster, shard, TakeBlock(**fields, block=others)) if isinstance(e, SendBlock)]
    refused = ask(cluster, shard, TakeBlock(**{**fields, "job": "other"}, block=own))
    assert not [effect for effect in refused if isinstance(effect, SendBlock)]


def test_fewer_epochs_than_were_trained_end_the_training_at_once(cluster: Cluster) -> None:
    submit(cluster, document(done=10, begun=0, leases=_all_done()), specification(stop={"epochs": 1}))
    run(cluster, 60, "done")
    assert not trained(cluster.workers())
    assert cluster.written["job"]["examples"] == 40


def _all_done() -> Any:
    book = LeaseBook(batch=4, epochs=2, seed=0)
    book.declare(EXAMPLES)
    for lease in book.grant("train", "w", 13):
        book.finish("w", lease.number)
    return book.cut()


def test_a_checkpoint_is_taken_of_a_job_that_trains_and_of_no_other(cluster: Cluster) -> None:
    with pytest.raises(UnknownJobError):
        cluster.core.checkpoint("job", cluster.now)
    cluster.submit(specification(stop={"epochs": 50}))
    with pytest.raises(EndedJobError, match="taken while a job is training"):
        cluster.core.checkpoint("job", cluster.now)
    cluster.run(30, until="training")
    number, effects = cluster.core.checkpoint("job", cluster.now)
    cluster.carry_out(effects)
    assert number == 1
    for worker in cluster.workers():
        assert worker.order is not None
        assert worker.order.checkpoint == 1, "told at once"
    for name in ("shard-0", "shard-1"):
        shard = cluster.shard(name)
        assert shard.order is not None
        assert shard.order.members == (), "nobody waits for who has stopped"
    cluster.run(11)  # these workers know nothing of stopping
    figures = cluster.core.snapshot(cluster.now)["job"]["checkpoint"]
    assert figures["given_up"] == 1
    assert "did not stop and copy within 10 s" in figures["reason"]
    assert cluster.state() == "training"


def test_a_process_of_another_role_stores_nothing(cluster: Cluster) -> None:
    cluster.submit(specification(stop={"epochs": 50}))
    cluster.run(30, until="training")
    cluster.carry_out(cluster.core.checkpoint("job", cluster.now)[1])
    worker = cluster.worker("worker-0")
    piece = CheckpointPiece(
        name="worker-0",
        incarnation=worker.membership.incarnation,
        job="job",
        checkpoint=1,
        part="shard-0",
        offset=0,
        total=4,
    )
    before = cluster.core.counts["unknown-session"]
    effects = ask(cluster, worker, piece, [memoryview(b"evil")])
    assert cluster.core.counts["unknown-session"] == before + 1
    assert [type(effect).__name__ for effect in effects] == ["Send"]


def test_the_residual_of_a_worker_that_dies_counts_as_lost_with_its_last_norm(cluster: Cluster) -> None:
    class Holding(FakeWorker):
        def report(self) -> Any:
            report = super().report()
            return type(report)(**{**{f: getattr(report, f) for f in report.__struct_fields__}, "residual_norm": 3.0})

    cluster.kill("worker-1")
    cluster.start(Holding("worker-1", pid=99))
    cluster.submit(specification(stop={"epochs": 10}))
    cluster.run(30, until="training")
    cluster.run(2)
    cluster.kill("worker-1")
    cluster.run(60, until="done")
    result = cluster.written["job"]
    assert (result["residuals_lost"], result["residuals_lost_norm"]) == (1, 3.0)
