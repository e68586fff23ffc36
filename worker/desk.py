"""The desk between a worker's two threads: orders come in, what the worker is and holds goes out.

The control thread writes orders and reads reports; the main thread reads orders and writes results.
Every method takes the one lock; waits have a deadline and are woken by whatever changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from paramserver.protocol.layout import Layout
from paramserver.protocol.messages import (
    CheckpointPiece,
    CheckpointStored,
    ExportPart,
    KeptState,
    Lease,
    LeaseDone,
    Orders,
    TakeState,
    WorkerOrder,
    WorkerReport,
)
from paramserver.protocol.pieces import Download
from paramserver.protocol.pieces import Upload as PieceUpload
from worker.counters import Counters
from worker.leases import LeaseBook

PART_BYTES = 2 * 2**20

# The kinds of lease that each stage of an order runs; others are handed back.
KINDS: dict[str, frozenset[str]] = {
    "initialise": frozenset({"initialise"}),
    "train": frozenset({"train"}),
    "drain": frozenset(),
    "evaluate": frozenset({"evaluate"}),
    "export": frozenset({"export"}),
}


@dataclass
class Upload:
    """An export on its way: parts are sent one after another, each when the one before is stored."""

    lease: int
    data: memoryview
    stored: int = 0

    @property
    def is_complete(self) -> bool:
        return self.stored >= len(self.data)

    def part(self, name: str, incarnation: int, job: str) -> tuple[ExportPart, memoryview]:
        """The next part and its frame."""
        message = ExportPart(
            name=name, incarnation=incarnation, job=job, lease=self.lease, offset=self.stored, total=len(self.data)
        )
        return message, self.data[self.stored : self.stored + PART_BYTES]


@dataclass
class JobState:
    """What a worker knows and says of one job. Fields are changed under the desk's lock."""

    order: WorkerOrder
    incarnation: int
    leases: LeaseBook = field(default_factory=LeaseBook)
    counters: Counters = field(default_factory=Counters)
    stage: str = "loading"
    layout: Layout | None = None
    examples: dict[str, int] = field(default_factory=dict)
    drained: bool = False
    failed: str = ""
    upload: Upload | None = None
    checkpoint: int = 0  # the one for which nothing of this worker is on its way now
    stopped_for: int = 0  # the last one that it has stopped for, and gone on
    kept: PieceUpload | None = None  # the own state on its way into the checkpoint `kept_number`
    kept_number: int = 0
    kept_bytes: int = 0
    taking: Download | None = None  # a predecessor's state, from the checkpoint that the job goes on from
    adopted: frozenset[int] = frozenset()  # the blocks whose residuals of it may be used


class Desk:
    """Shared by the main thread and the control thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._job: JobState | None = None
        self._failure: BaseException | None = None
        self._is_urgent = False
        self._is_shut_down = False
        self._answered = 0  # orders and other answers heard, to see that a goodbye arrived
        self._sent = 0  # heartbeats made

    # ---------------------------------------------------------------- the main thread

    @property
    def job(self) -> JobState | None:
        """The job of the last order. Another object means another job, or the same one taken up anew."""
        return self._job

    @property
    def is_shut_down(self) -> bool:
        return self._is_shut_down

    def check(self) -> None:
        """Raise what ended the control thread, so that the process ends with it."""
        if self._failure is not None:
            raise self._failure

    def wait(self, is_over: Callable[[], bool], timeout_seconds: float) -> bool:
        """Sleep until it is over, something failed, or the time is up. `is_over` is asked under the lock."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or is_over(), timeout_seconds)
        self.check()
        return is_over()

    def begin_lease(self, state: JobState, kind: str) -> Lease | None:
        with self._changed:
            lease = state.leases.begin(kind)
            # Told at once, so that a death in the middle of it is known to repeat it.
            self._is_urgent = self._is_urgent or lease is not None
            return lease

    def finish_lease(self, state: JobState, result: LeaseDone) -> None:
        """Report a result at once; it is repeated until the coordinator has recorded it."""
        self.update(state, lambda: state.leases.finish(result))

    def leave(self) -> None:
        """Hand every lease back: this process ends."""
        if (state := self._job) is not None:
            self.update(state, state.leases.leave)

    def update(self, state: JobState, change: Callable[[], None]) -> None:
        """Change what is reported of a job, and report it at once."""
        with self._changed:
            change()
            self._is_urgent = True

    def fail_job(self, state: JobState, text: str) -> None:
        def change() -> None:
            state.failed = text[:4096]

        self.update(state, change)

    def wait_reported(self, timeout_seconds: float) -> bool:
        """Whether a heartbeat that was made after this call was answered in time."""
        with self._changed:
            self._is_urgent = True
            sent, answered = self._sent, self._answered
            return self._changed.wait_for(
                lambda: self._failure is not None or (self._sent > sent and self._answered > answered), timeout_seconds
            )

    # --------------------------------------------------------- checkpoints (see checkpoint.py)

    def stop_for(self, state: JobState, number: int, content: PieceUpload | None) -> None:
        """This worker waits, and `content` is what it sends for the checkpoint: None where it has nothing."""

        def change() -> None:
            state.checkpoint = state.kept_number = number
            state.kept = content
            state.kept_bytes = 0 if content is None else content.total

        self.update(state, change)

    def go_on(self, state: JobState, number: int) -> None:
        """It waits no longer, whatever came of the checkpoint."""

        def change() -> None:
            state.stopped_for, state.checkpoint = number, 0

        self.update(state, change)

    def take_state(self, state: JobState) -> Download:
        """Ask for a predecessor's state; the control thread fetches it."""
        with self._changed:
            if state.taking is None:
                state.taking = Download()
            return state.taking

    def next_errand(self, name: str, now: float) -> tuple[CheckpointPiece | TakeState, list[memoryview]] | None:
        """What the control thread must send for a checkpoint now, or None."""
        with self._changed:
            state = self._job
            if state is None:
                return None
            who = {"name": name, "incarnation": state.incarnation, "job": state.order.job}
            if state.kept is not None and (piece := state.kept.due(now)) is not None:
                place = {"checkpoint": state.kept_number, "offset": piece[0], "total": state.kept.total}
                return CheckpointPiece(**who, part="", **place), [piece[1]]  # type: ignore[arg-type]
            if state.taking is not None and (offset := state.taking.due(now)) is not None:
                return TakeState(**who, offset=offset), []  # type: ignore[arg-type]
            return None

    def checkpoint_stored(self, message: CheckpointStored) -> None:
        with self._changed:
            state = self._job
            if state is None or state.order.job != message.job or message.checkpoint != state.kept_number:
                return
            if state.kept is not None:
                state.kept.heard(message.stored)
                if state.kept.is_complete:
                    state.kept = None  # its memory is as large as the model

    def state_came(self, message: KeptState, piece: memoryview) -> None:
        with self._changed:
            state = self._job
            if state is None or state.order.job != message.job or state.taking is None:
                return
            state.adopted = frozenset(message.adopted)
            state.taking.heard(message.offset, message.total, piece)
            self._changed.notify_all()

    # ------------------------------------------------------------- the control thread

    def take_orders(self, orders: Orders, incarnation: int) -> None:
        """Become what the coordinator says."""
        with self._changed:
            order = orders.order
            self._is_shut_down = self._is_shut_down or orders.shutdown
            if not isinstance(order, WorkerOrder):
                self._job = None
            else:
                state = self._job
                if state is None or state.order.job != order.job or state.incarnation != incarnation:
                    state = self._job = JobState(order, incarnation)
                    self._is_urgent = True
                state.order = order
                if state.checkpoint != order.checkpoint and (not order.checkpoint or state.stage != "train"):
                    # Nothing is on its way, and training begins with a look at the order: see CheckpointStop.
                    state.checkpoint, state.kept_bytes = order.checkpoint, 0
                    self._is_urgent = True
                if order.placement:
                    state.layout = None  # declared long enough
                kinds = KINDS[order.stage]
                if state.leases.take_orders(order.grants, orders.confirmed, order.hold, kinds):
                    self._is_urgent = True
            self._changed.notify_all()

    def heard(self) -> None:
        """Something came from the coordinator."""
        with self._changed:
            self._answered += 1
            self._changed.notify_all()

    def export_stored(self, job: str, lease: int, stored: int) -> bool:
        """Note how much of the export is stored. True where a next part is due."""
        with self._changed:
            upload = self._job.upload if self._job is not None and self._job.order.job == job else None
            if upload is None or upload.lease != lease or stored > len(upload.data):
                return False
            # Also backwards: a coordinator that came back may have lost the last part.
            upload.stored = stored
            self._changed.notify_all()
            return not upload.is_complete

    def next_part(self, name: str) -> tuple[ExportPart, memoryview] | None:
        """The part of an export that is due, or None."""
        with self._changed:
            state = self._job
            if state is None or state.upload is None or state.upload.is_complete:
                return None
            return state.upload.part(name, state.incarnation, state.order.job)

    def take_urgent(self) -> bool:
        """Whether something changed that the coordinator should hear of at once."""
        with self._changed:
            urgent, self._is_urgent = self._is_urgent, False
            return urgent

    def fail(self, failure: BaseException) -> None:
        """The control thread ended: the main thread ends with this."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def report(self) -> WorkerReport:
        """What the worker is now, for a heartbeat."""
        with self._changed:
            self._sent += 1
            state = self._job
            if state is None:
                return WorkerReport()
            counters = state.counters
            return WorkerReport(
                job=state.order.job,
                stage=state.stage,
                layout=state.layout,
                examples=dict(state.examples),
                held=state.leases.held,
                returned=state.leases.returned,
                done=state.leases.done,
                drained=state.drained,
                failed=state.failed,
                steps=counters.steps,
                finished_examples=counters.finished_examples,
                elements=counters.elements,
                loss=counters.loss,
                skipped_steps=counters.skipped_steps,
                push_bytes=counters.push_bytes,
                pull_bytes=counters.pull_bytes,
                retries=counters.retries,
                reconnections=counters.reconnections,
                refusals=dict(counters.refusals),
                residual_norm=counters.residual_norm,
                in_flight=counters.in_flight,
                waiting_seconds=counters.waiting_seconds,
                working_seconds=counters.working_seconds,
                device=counters.device,
                begun=state.leases.begun,
                metrics=dict(counters.metrics),
                checkpoint=state.checkpoint,
                checkpoint_bytes=state.kept_bytes if state.checkpoint else 0,
            )
