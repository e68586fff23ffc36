"""Leases, the desk, and the control loop: what the coordinator hears, beat by beat."""

from __future__ import annotations

import threading

import pytest
from worker_rig import make_parameters

from paramserver.protocol.memory import MemoryNetwork
from paramserver.protocol.messages import (
    ExportPart,
    ExportStored,
    Heartbeat,
    Lease,
    LeaseDone,
    Message,
    Orders,
    Refusal,
    Register,
    Registered,
    WorkerOrder,
    WorkerReport,
)
from paramserver.protocol.transport import Received
from worker.control import ControlLoop, ControlThread
from worker.desk import PART_BYTES, Desk, Upload
from worker.errors import WorkerError
from worker.leases import LeaseBook
from worker.replica import Replica

TRAIN = frozenset({"train"})


def leases(*numbers: int, kind: str = "train") -> tuple[Lease, ...]:
    return tuple(Lease(number, kind, examples=(number,)) for number in numbers)  # type: ignore[arg-type]


def order(stage: str = "train", job: str = "job", hold: int = 100, grants: tuple[Lease, ...] = ()) -> WorkerOrder:
    return WorkerOrder(job=job, specification="{}", stage=stage, hold=hold, grants=grants)  # type: ignore[arg-type]


class Office:
    """A coordinator's end, step by step."""

    def __init__(self) -> None:
        self.network = MemoryNetwork(seed=1)
        self.listener = self.network.listen("coordinator:0")
        self.desk = Desk()
        self.loop = ControlLoop(
            self.network.connect(self.listener.address), "worker-0", self.desk, lambda: self.network.now
        )
        self.peer = b""
        self.frames: tuple[memoryview, ...] = ()

    def hear(self) -> list[Message]:
        self.loop.step(0)
        heard = []
        while (received := self.listener.receive(0)) is not None:
            assert isinstance(received, Received)
            self.peer, self.frames = received.peer, received.frames
            heard.append(received.message)
        return heard

    def answer(self, message: Message) -> None:
        self.listener.send(self.peer, message)
        self.loop.step(0)

    def join(self) -> None:
        self.hear()
        self.answer(Registered(incarnation=4, heartbeat_seconds=0.5, session_seconds=3.0))
        self.hear()

    def report(self) -> WorkerReport:
        self.network.advance(0.6)
        *_, beat = (message for message in self.hear() if isinstance(message, Heartbeat))
        assert isinstance(beat.report, WorkerReport)
        return beat.report


def test_granted_leases_are_begun_in_order_and_reported_until_confirmed() -> None:
    book = LeaseBook()
    book.take_orders(leases(1, 2), (), 100, TRAIN)
    begun = book.begin("train")
    assert begun is not None
    assert begun.number == 1
    assert book.held == (1, 2)
    book.finish(LeaseDone(number=1, steps=3))
    book.take_orders((), (), 100, TRAIN)
    assert [done.number for done in book.done] == [1]
    book.take_orders((), (1,), 100, TRAIN)
    assert book.done == ()
    assert book.held == (2,)


def test_repeated_grant_is_held_once_and_a_finished_one_is_not_begun_again() -> None:
    book = LeaseBook()
    for _ in range(3):
        book.take_orders(leases(1), (), 100, TRAIN)
    assert book.begin("train") is not None
    book.finish(LeaseDone(number=1))
    book.take_orders(leases(1), (), 100, TRAIN)
    assert book.begin("train") is None
    assert [done.number for done in book.done] == [1]
    for confirmed in ((1,), ()):
        book.take_orders(leases(1), confirmed, 100, TRAIN)
        assert book.begin("train") is None
    assert book.done == ()


def test_surplus_over_hold_is_returned_newest_first_and_never_what_is_begun() -> None:
    book = LeaseBook()
    book.take_orders(leases(1, 2, 3, 4), (), 100, TRAIN)
    book.begin("train")
    assert book.take_orders(leases(1, 2, 3, 4), (), 2, TRAIN)
    assert book.held == (1, 2)
    assert book.returned == (3, 4)
    book.take_orders(leases(3), (), 0, TRAIN)
    assert book.held == (1,)
    assert book.returned == (2, 3)  # 4 is granted no longer: its return is known
    book.take_orders((), (), 0, TRAIN)
    assert book.returned == ()


def test_lease_that_is_anothers_by_now_is_forgotten_unless_it_is_begun() -> None:
    book = LeaseBook()
    book.take_orders(leases(1, 2), (), 100, TRAIN)
    book.begin("train")
    book.take_orders(leases(3), (1, 2), 100, TRAIN)
    assert book.held == (1, 3)
    assert book.returned == ()
    book.finish(LeaseDone(number=1))
    assert [done.number for done in book.done] == [1]


def test_leases_of_another_stage_are_returned() -> None:
    book = LeaseBook()
    book.take_orders(leases(1, 2), (), 100, TRAIN)
    book.begin("train")
    book.take_orders(leases(1, 2), (), 100, frozenset())
    assert book.held == (1,)
    assert book.returned == (2,)


def test_leaving_worker_returns_everything_and_takes_nothing_more() -> None:
    book = LeaseBook()
    book.take_orders(leases(1, 2), (), 100, TRAIN)
    book.begin("train")
    book.leave()
    book.take_orders(leases(1, 2, 3), (), 100, TRAIN)
    assert book.held == ()
    assert book.returned == (1, 2, 3)
    assert book.begun == (1,)
    book.take_orders((), (), 100, TRAIN)
    assert book.begun == (1,), "told until the end: the order may answer an older beat"


def test_lease_is_begun_from_its_first_batch_until_it_is_done() -> None:
    book = LeaseBook()
    book.take_orders(leases(1, 2, 3), (), 100, TRAIN)
    assert book.begun == ()
    book.begin("train")
    book.begin("train")
    assert book.begun == (1, 2)
    book.finish(LeaseDone(number=1))
    assert book.begun == (2,)
    book.take_orders((), (), 0, TRAIN)
    assert book.returned == (3,)
    assert book.begun == (2,), "what is handed back unbegun is not begun"


def test_forgotten_worker_registers_again_with_the_incarnation_that_it_has() -> None:
    office = Office()
    (first,) = office.hear()
    assert isinstance(first, Register)
    assert (first.role, first.incarnation) == ("worker", 0)
    office.answer(Registered(incarnation=4, heartbeat_seconds=0.5, session_seconds=3.0))
    (beat,) = office.hear()
    assert isinstance(beat, Heartbeat)
    office.answer(Orders(number=9, order=order(grants=leases(1, 2))))
    held = office.desk.job
    office.answer(Refusal(code="unknown-session", detail="a new coordinator"))
    (again,) = (message for message in office.hear() if isinstance(message, Register))
    assert again.incarnation == 4
    office.answer(Registered(incarnation=4, heartbeat_seconds=0.5, session_seconds=3.0))
    assert office.report().held == (1, 2)
    office.answer(Orders(number=1, order=order(grants=leases(1, 2))))
    assert office.desk.job is held


def test_taken_name_ends_the_process_with_one_clear_line_after_two_sessions() -> None:
    office = Office()

    def be_refused() -> None:
        while True:
            assert office.network.now < 60
            if office.hear():
                office.answer(Refusal(code="name-taken", detail="worker-0 is alive"))
            office.network.advance(0.5)

    with pytest.raises(WorkerError, match="belongs to a live process"):
        be_refused()
    assert office.network.now > 6.0


def test_finished_lease_is_told_at_once() -> None:
    office = Office()
    office.join()
    office.answer(Orders(number=1, order=order(grants=leases(1))))
    office.hear()
    state = office.desk.job
    assert state is not None
    assert office.desk.begin_lease(state, "train") is not None
    office.desk.finish_lease(state, LeaseDone(number=1, steps=2, loss_sum=4.0))
    (beat,) = office.hear()  # no time has passed
    assert isinstance(beat, Heartbeat)
    assert isinstance(beat.report, WorkerReport)
    assert beat.report.done == (LeaseDone(number=1, steps=2, loss_sum=4.0),)
    assert beat.seen == 1
    assert office.report().done, "repeated until it is confirmed"
    office.answer(Orders(number=2, order=order(), confirmed=(1,)))
    assert office.report().done == ()


def test_begun_lease_is_told_at_once_and_with_every_beat() -> None:
    office = Office()
    office.join()
    office.answer(Orders(number=1, order=order(grants=leases(*range(1, 9)))))
    office.hear()
    state = office.desk.job
    assert state is not None
    assert office.report().begun == ()
    assert office.desk.begin_lease(state, "train") is not None
    (beat,) = office.hear()  # no time has passed
    assert isinstance(beat, Heartbeat)
    assert isinstance(beat.report, WorkerReport)
    assert beat.report.begun == (1,)
    assert office.report().begun == (1,)


def test_layout_is_declared_until_the_job_is_placed() -> None:
    office = Office()
    office.join()
    office.answer(Orders(number=1, order=order("initialise", grants=leases(1, kind="initialise"))))
    state = office.desk.job
    assert state is not None
    layout = Replica(make_parameters()).layout

    def declare() -> None:
        state.layout, state.examples = layout, {"train": 3}

    office.desk.update(state, declare)
    report = office.report()
    assert (report.layout, report.examples) == (layout, {"train": 3})


def test_another_job_and_no_job_drop_what_was_held() -> None:
    office = Office()
    office.join()
    office.answer(Orders(number=1, order=order(grants=leases(1))))
    first = office.desk.job
    assert first is not None
    office.answer(Orders(number=2, order=order(job="next")))
    assert office.desk.job is not first
    office.desk.fail_job(first, "of a job that is over")
    assert office.report().failed == ""
    office.answer(Orders(number=3))
    assert office.desk.job is None
    assert office.report() == WorkerReport()


def test_export_goes_part_by_part_and_survives_lost_answers() -> None:
    office = Office()
    office.join()
    office.answer(Orders(number=1, order=order("export", grants=leases(7, kind="export"))))
    state = office.desk.job
    assert state is not None
    data = bytes(range(256)) * (PART_BYTES // 256) + b"tail"
    upload = Upload(7, memoryview(data))
    office.desk.update(state, lambda: setattr(state, "upload", upload))
    stored, parts = b"", 0
    while not upload.is_complete:
        assert office.network.now < 60
        for message in office.hear():
            if not isinstance(message, ExportPart):
                continue
            assert (message.lease, message.total, message.incarnation) == (7, len(data), 4)
            parts += 1
            if parts == 1:
                continue  # lost
            assert message.offset == len(stored)
            stored += bytes(office.frames[-1])
            office.listener.send(office.peer, ExportStored(job="job", lease=7, stored=len(stored)))
        office.network.advance(0.5)
    assert stored == data
    assert parts == 3


def test_failure_of_the_control_thread_reaches_the_main_thread() -> None:
    desk = Desk()

    def no_transport() -> MemoryNetwork:
        raise RuntimeError("no sockets left")

    thread = ControlThread(no_transport, "coordinator", "worker-0", desk)
    thread.start()
    with pytest.raises(RuntimeError, match="no sockets left"):
        desk.wait(lambda: False, 10.0)
    thread.close()
    assert threading.active_count() >= 1
