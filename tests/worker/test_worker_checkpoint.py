"""A worker stops for a checkpoint with nothing on its way, keeps what is its own, and a successor goes on with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from worker_rig import SHAPES, CountingTask, ListedLeases, Rig, make_gradients, make_parameters

from paramserver.job import OptimizerSettings
from paramserver.protocol.messages import (
    CheckpointPiece,
    CheckpointStored,
    KeptState,
    Lease,
    Orders,
    TakeState,
    WorkerOrder,
)
from paramserver.protocol.pieces import Upload
from worker.checkpoint import LEASE_PATIENCE_SECONDS, PAUSE_SECONDS, CheckpointStop, adopt, worker_file
from worker.desk import Desk, JobState
from worker.errors import JobFailure
from worker.local_optimizer import LocalOptimizer
from worker.replica import Replica
from worker.train import Trainer

ORDER = WorkerOrder(job="job", specification="{}", stage="train")


class Stops:
    """A Stop that is due at the given looks; it notes what was true when training stood still."""

    def __init__(self, due: Callable[[int, bool], bool]) -> None:
        self.due = due
        self.looks = 0
        self.seen: list[Any] = []
        self.note: Callable[[], Any] = lambda: None

    def is_due(self, is_between_leases: bool) -> bool:
        self.looks += 1
        return self.due(self.looks, is_between_leases)

    def stop(self) -> None:
        self.seen.append(self.note())


def train(stops: Stops, leases: int = 3, overlap: bool = True) -> tuple[Rig, ListedLeases]:
    rig, task = Rig(), CountingTask()
    replica = Replica(task.parameters())
    exchange = rig.connect(replica=replica)
    exchange.pull(0)
    source = ListedLeases([Lease(number, "train", examples=(number,)) for number in range(1, leases + 1)])
    stops.note = lambda: (
        sum(len(client.requests) for client in exchange._clients),
        rig.updates() // len(SHAPES),
        [result.number for result in source.results],
    )
    patience = 0.0 if overlap else math.inf
    Trainer(task, replica, exchange, source, rig.counters, None, patience, stop=stops).run()
    return rig, source


@pytest.mark.parametrize("overlap", [True, False])
def test_between_leases_nothing_is_on_its_way_and_every_ended_lease_has_its_result(overlap: bool) -> None:
    stops = Stops(lambda look, is_between: is_between)
    rig, source = train(stops, overlap=overlap)
    # (requests on their way, steps applied, leases with a result): two steps a lease.
    assert stops.seen[:4] == [(0, 0, []), (0, 2, [1]), (0, 4, [1, 2]), (0, 6, [1, 2, 3])]
    assert rig.counters.steps == 6
    assert len(source.results) == 3


@pytest.mark.parametrize("overlap", [True, False])
def test_in_the_middle_of_a_lease_nothing_is_on_its_way_and_the_lease_goes_on(overlap: bool) -> None:
    stops = Stops(lambda look, is_between: look == 3)  # before the lease, its first batch, its second
    rig, source = train(stops, leases=1, overlap=overlap)
    assert stops.seen == [(0, 1, [])]
    assert (rig.counters.steps, len(source.results)) == (2, 1)
    assert source.results[0].steps == 2


# --------------------------------------------------------------------------- the stop itself


class Stopped:
    """A stop on a rig, with a clock that passes only while it is waited."""

    def __init__(self, encoding: str = "int4") -> None:
        self.rig = Rig(encoding)
        self.desk = Desk()
        self.now = 100.0
        self.looks = 0
        self.order(0)
        assert self.desk.job is not None
        self.state: JobState = self.desk.job
        self.state.stage = "train"
        self.on_look: Callable[[], None] = lambda: None
        self.stop = CheckpointStop(self.desk, self.state, self.rig.exchange, None, self.look, clock=lambda: self.now)

    def order(self, checkpoint: int, **changes: Any) -> None:
        number = self.desk.report().steps + self.looks + checkpoint + 1
        order = structs.replace(ORDER, checkpoint=checkpoint, **changes)
        self.desk.take_orders(Orders(number=number, order=order), 1)

    def look(self) -> None:
        self.looks += 1
        self.now += 0.5
        self.on_look()

    def push(self, step: int) -> None:
        self.rig.exchange.begin(make_gradients(step), self.rig.replica.editions.copy(), step)
        self.rig.exchange.settle()


def test_without_an_order_nothing_is_due() -> None:
    stopped = Stopped()
    assert not stopped.stop.is_due(is_between_leases=True)
    assert stopped.desk.report().checkpoint == 0


def test_a_lease_may_end_first_within_reason() -> None:
    stopped = Stopped()
    stopped.order(5)
    assert not stopped.stop.is_due(is_between_leases=False)
    assert stopped.stop.is_due(is_between_leases=True)
    stopped.now += LEASE_PATIENCE_SECONDS - 0.1
    assert not stopped.stop.is_due(is_between_leases=False)
    stopped.now += 0.1
    assert stopped.stop.is_due(is_between_leases=False)


def test_a_stopped_worker_says_so_and_waits_until_the_order_lets_it_go() -> None:
    stopped = Stopped()
    stopped.push(1)
    stopped.order(5)
    said: list[tuple[int, int]] = []

    def on_look() -> None:
        report = stopped.desk.report()
        said.append((report.checkpoint, report.checkpoint_bytes))
        if stopped.looks == 3:
            stopped.order(0)

    stopped.on_look = on_look
    stopped.stop.stop()
    assert len(said) == 3
    assert {number for number, _ in said} == {5}
    assert said[0][1] == len(worker_file(stopped.rig.exchange, None)) > 0
    assert stopped.desk.report().checkpoint == 0
    assert stopped.rig.counters.waiting_seconds == 0.0, "the rig's counters are another's"
    assert stopped.state.counters.waiting_seconds == 1.5


def test_a_worker_that_hears_nothing_goes_on_by_itself_once_and_for_all() -> None:
    stopped = Stopped()
    stopped.order(5)
    stopped.stop.stop()
    assert stopped.now - 100.0 == PAUSE_SECONDS
    assert not stopped.stop.is_due(is_between_leases=True), "not for the same one again"
    assert stopped.desk.report().checkpoint == 0
    stopped.order(6)
    assert stopped.stop.is_due(is_between_leases=True)


def test_a_worker_that_does_not_train_says_at_once_that_nothing_is_on_its_way() -> None:
    desk = Desk()
    desk.take_orders(Orders(number=1, order=ORDER), 1)
    desk.take_orders(Orders(number=2, order=structs.replace(ORDER, checkpoint=5)), 1)
    report = desk.report()
    assert (report.stage, report.checkpoint, report.checkpoint_bytes) == ("loading", 5, 0)
    state = desk.job
    assert state is not None
    state.stage = "train"
    rig = Rig()
    stop = CheckpointStop(desk, state, rig.exchange, None, lambda: None)
    assert stop.is_due(is_between_leases=True), "it begins with the wait"
    desk.take_orders(Orders(number=3, order=ORDER), 1)
    assert desk.report().checkpoint == 0
    assert not stop.is_due(is_between_leases=True)


def test_the_copy_is_sent_in_pieces_until_it_is_stored_or_not_wanted() -> None:
    stopped = Stopped()
    stopped.desk.stop_for(stopped.state, 5, Upload(b"0123456789"))
    errand = stopped.desk.next_errand("w", 0.0)
    assert errand is not None
    piece, frames = errand
    assert isinstance(piece, CheckpointPiece)
    assert (piece.checkpoint, piece.part, piece.offset, piece.total) == (5, "", 0, 10)
    assert bytes(frames[0]) == b"0123456789"
    assert stopped.desk.next_errand("w", 0.1) is None
    stopped.desk.checkpoint_stored(CheckpointStored(job="job", checkpoint=4, part="", stored=10))
    assert stopped.state.kept is not None
    stopped.desk.checkpoint_stored(CheckpointStored(job="job", checkpoint=5, part="", stored=10))
    assert stopped.state.kept is None
    assert stopped.desk.next_errand("w", 1e9) is None


# ---------------------------------------------------------------------------- what is its own


@pytest.mark.parametrize("encoding", ["int4", "ternary", "sign"])
def test_a_successor_adopts_the_residuals_of_the_blocks_that_it_may(encoding: str) -> None:
    first = Stopped(encoding)
    for step in (1, 2):
        first.push(step)
    content = worker_file(first.rig.exchange, None)
    kept = {block: first.rig.exchange.residuals.of(block).copy() for block in range(len(SHAPES))}
    first.push(3)
    second = Rig(encoding)
    adopt(content, frozenset({0, 2}), second.exchange, None)
    for block, residual in kept.items():
        found = second.exchange.residuals.find(block)
        if block in (0, 2) and residual.any():
            np.testing.assert_array_equal(found, residual)
        else:
            assert found is None
    assert any(kept[block].any() for block in (0, 2))


def test_what_is_kept_of_a_residual_names_the_last_update_of_its_block() -> None:
    stopped = Stopped()
    for step in (1, 2, 3):
        stopped.push(step)
    kept = stopped.rig.exchange.kept_residuals()
    assert kept
    for sequence, residual, norm in kept.values():
        assert sequence == 3
        assert norm == pytest.approx(float(torch.linalg.vector_norm(residual)))


def test_lossless_pushes_keep_nothing_and_send_no_file() -> None:
    stopped = Stopped("fp32")
    stopped.push(1)
    assert worker_file(stopped.rig.exchange, None) == b""
    stopped.order(5)
    stopped.on_look = lambda: stopped.order(0)
    stopped.stop.stop()
    assert stopped.state.kept is None


@pytest.mark.parametrize("name", ["momentum", "adagrad", "adam", "rmsprop"])
def test_a_successor_goes_on_with_the_state_of_its_optimizer(name: str) -> None:
    settings = OptimizerSettings(name=name, where="worker", lr=0.1)  # type: ignore[arg-type]
    first, second = (LocalOptimizer(settings, make_parameters()) for _ in range(2))
    rig = Rig("fp32")
    for step in (1, 2, 3):
        first.step(make_gradients(step))
    content = worker_file(rig.exchange, first)
    adopt(content, frozenset(), Rig("fp32").exchange, second)
    expected = {parameter: update.clone() for parameter, update in first.step(make_gradients(9)).items()}
    for parameter, update in second.step(make_gradients(9)).items():
        assert torch.equal(update, expected[parameter])


@pytest.mark.parametrize("spoil", ["cut", "another model", "not finite"])
def test_a_file_that_does_not_fit_ends_the_job_with_what_to_do(spoil: str) -> None:
    stopped = Stopped()
    stopped.push(1)
    content = worker_file(stopped.rig.exchange, None)
    if spoil == "cut":
        content = content[: len(content) // 2]
    elif spoil == "another model":
        content = content.replace(b"residual.0", b"residual.1")
    else:
        block = stopped.rig.exchange.residuals.of(0)
        block[3] = np.nan  # type: ignore[index]
        content = worker_file(stopped.rig.exchange, None)
    with pytest.raises(JobFailure, match="submit the job without --resume"):
        adopt(content, frozenset(range(3)), Rig("int4").exchange, None)


def test_a_predecessors_state_is_asked_for_until_it_is_whole() -> None:
    stopped = Stopped()
    taking = stopped.desk.take_state(stopped.state)
    errand = stopped.desk.next_errand("w", 0.0)
    assert errand is not None
    assert isinstance(errand[0], TakeState)
    assert errand[0].offset == 0
    message = KeptState(job="job", offset=0, total=4, adopted=(1, 2))
    stopped.desk.state_came(message, memoryview(b"ab"))
    assert not taking.is_complete
    again = stopped.desk.next_errand("w", 0.0)
    assert again is not None
    assert isinstance(again[0], TakeState)
    assert again[0].offset == 2
    stopped.desk.state_came(structs.replace(message, offset=2), memoryview(b"cd"))
    assert taking.is_complete
    assert (bytes(taking.data), stopped.state.adopted) == (b"abcd", {1, 2})
    assert stopped.desk.next_errand("w", 1e9) is None
