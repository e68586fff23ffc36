"""One job from its turn in the queue to its end: its states, its leases, and what each process should be doing.

The states and what ends each are in docs/architecture.md. Nothing here waits or sends: the core feeds it what
processes report and asks it for their orders; facts to store are appended to `effects`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from paramserver.coordinator.checkpoints.of_job import JobCheckpoints
from paramserver.coordinator.effects import (
    Effect,
    Happened,
    JobRecord,
    LeaseResult,
    SaveDocument,
    SaveJob,
    Send,
)
from paramserver.coordinator.events import Events
from paramserver.coordinator.exporting import ModelExport
from paramserver.coordinator.failover import RETURN_SECONDS, Failover, holder_of, is_held_by
from paramserver.coordinator.leasing import Leasing
from paramserver.coordinator.ordering import ShardOrders, Stamp, addresses
from paramserver.coordinator.placement import PlacedPart, Placement, PlacementError, place
from paramserver.coordinator.sessions import SESSION_SECONDS, Session
from paramserver.coordinator.telemetry import Telemetry
from paramserver.encoding.layers import unmatched
from paramserver.job import Job, symbol_of, unit_of
from paramserver.protocol.layout import Layout, LayoutError, check_layout
from paramserver.protocol.messages import (
    ExportPart,
    ExportStored,
    Member,
    PartAddress,
    PartReport,
    ShardOrder,
    ShardReport,
    WorkerOrder,
    WorkerReport,
)
from paramserver.protocol.transport import Peer
from paramserver.router.leases import Kind, LeaseError

ACTIVE_STATES = ("initialising", "training", "draining", "evaluating", "exporting")
FINAL_STATES = ("done", "failed", "cancelled")
KIND_OF_STATE: dict[str, Kind] = {
    "initialising": "initialise",
    "training": "train",
    "evaluating": "evaluate",
    "exporting": "export",
}


class JobRun:
    """The job whose turn it is.

    Args:
        record: its stored row, state "queued" or, after a restart, an active one.
        effects: shared with the core; what must be stored is appended.
        count: counts a peer's inconsistent message by name.
        documents, results: what an earlier coordinator stored of it.
        session_seconds: after so long a silence a session ends.
        is_restored: the coordinator was started again; for as long as a session lasts processes may come back and say
            what they hold, before anything moves.
    """

    def __init__(
        self,
        record: JobRecord,
        now: float,
        effects: list[Effect],
        count: Callable[[str], None],
        documents: Mapping[str, Mapping[str, Any]] | None = None,
        results: Iterable[LeaseResult] = (),
        session_seconds: float = SESSION_SECONDS,
        is_restored: bool = False,
    ) -> None:
        documents = documents or {}
        self.record = record
        self.job = Job.model_validate_json(record.specification)
        self.symbol, self.unit = symbol_of(self.job), unit_of(self.job)
        self.telemetry = Telemetry()
        self.layout: Layout | None = None
        self.examples: dict[str, int] = {}
        self.workers_lost: list[str] = []
        self.shards_recovered: list[str] = []
        self._effects = effects
        self._count = count
        self._entered = now
        self._settled_at = now + (session_seconds if is_restored else 0.0)
        self._drained_at: float | None = None
        self.seconds: dict[str, float] = {}
        self.failover = Failover(
            has_journal=self.job.durability.log != "none",
            backups=self.job.durability.backups,
            session_seconds=session_seconds,
            settled_at=self._settled_at,
            due_at=now + (RETURN_SECONDS if is_restored else 0.0),
            store=self._store_placement,
            note=self.note,
        )
        self._addresses: tuple[int, tuple[PartAddress, ...]] = (0, ())  # and the revision that they are of
        self._orders = ShardOrders(record.id, record.specification, self.failover)
        self._restore(documents, list(results))

    # ------------------------------------------------------------------------------ restoring

    def _restore(self, documents: Mapping[str, Mapping[str, Any]], results: list[LeaseResult]) -> None:
        progress, placed = documents.get("progress", {}), documents.get("placed")
        self.checkpoints = JobCheckpoints(
            self.record.id, self.job, self._effects, self._count, documents.get("resume"), progress
        )
        resumed = self.checkpoints.resume.source if self.checkpoints.resume else None
        self.leasing = Leasing(self.record.id, self.job, self._effects, self._count, progress, results, resumed)
        self.book = self.leasing.book
        self.seconds = dict(progress.get("seconds", {}))
        self.workers_lost = list(progress.get("workers_lost", []))
        self.shards_recovered = list(progress.get("shards_recovered", []))
        self.events = Events(progress.get("events", []), progress.get("events_forgotten", 0))
        self.telemetry.restore(progress.get("counts", {}))
        self.export = ModelExport(self.record.id, bool(progress.get("is_exported", False)))
        if placed is not None:
            layout = msgspec.convert(placed["layout"], Layout)
            self._set_layout(layout, dict(placed["examples"]))
            self.failover.begin(msgspec.convert({"parts": placed["parts"]}, Placement), layout)
        elif resumed is not None:
            self._set_layout(resumed.layout, dict(resumed.examples))

    def save_progress(self, now: float) -> None:
        body = {
            **self.leasing.progress(),
            "seconds": self.seconds_by_state(now),
            "workers_lost": self.workers_lost,
            "shards_recovered": self.shards_recovered,
            "events": self.events.rows(),
            "events_forgotten": self.events.forgotten,
            "counts": self.telemetry.progress(),
            "is_exported": self.export.is_complete,
            **self.checkpoints.progress(),
        }
        self._effects.append(SaveDocument(self.record.id, "progress", body))

    def note(self, text: str, now: float) -> None:
        """Tell people what happened."""
        self.events.note(self.active_seconds(now), text)
        self._effects.append(Happened(self.record.id, text))
        self.save_progress(now)

    def save_leases_if_changed(self, now: float) -> None:
        """Call before any order is sent: a lease number must be known to a successor before it leaves."""
        if self.leasing.has_changed or self.checkpoints.cuts.has_changed:
            self.save_progress(now)

    # -------------------------------------------------------------------------------- states

    @property
    def state(self) -> str:
        return self.record.state

    def seconds_by_state(self, now: float) -> dict[str, float]:
        seconds = dict(self.seconds)
        seconds[self.state] = seconds.get(self.state, 0.0) + max(0.0, now - self._entered)
        return seconds

    def active_seconds(self, now: float) -> float:
        """Since the job's turn came."""
        return sum(seconds for state, seconds in self.seconds_by_state(now).items() if state in ACTIVE_STATES)

    def enter(self, state: str, now: float, reason: str = "") -> None:
        self.seconds = self.seconds_by_state(now)
        self.record = replace(self.record, state=state, reason=reason)
        self._entered = now
        self.leasing.forget_speeds()
        self.save_progress(now)
        if state not in FINAL_STATES:  # the core seals it: the result is stored before the state
            self._effects.append(SaveJob(self.record))

    def fail(self, reason: str, now: float) -> None:
        if self.state not in FINAL_STATES:
            self.enter("failed", now, reason)

    def is_settling(self, now: float) -> bool:
        return now < self._settled_at

    def advance(self, shards: list[Session], workers: list[Session], now: float) -> None:
        """Move on as far as what is known allows."""
        if self.state not in ACTIVE_STATES:
            return
        if why := self.failover.look({session.name: session for session in shards}, now):
            self.fail(why, now)
        if self.is_settling(now):
            return
        before = ""
        while before != self.state and self.state not in FINAL_STATES:
            before = self.state
            match self.state:
                case "initialising":
                    self._advance_initialising(shards, now)
                case "training":
                    if self.book.left("train") == 0 or self.has_enough_steps():
                        self.enter("draining", now)
                case "draining":
                    self._advance_draining(shards, workers, now)
                case "evaluating":
                    if self.book.left("evaluate") == 0:
                        self.enter("exporting", now)
                case "exporting":
                    self._advance_exporting(shards, now)
        if self.state not in FINAL_STATES:
            self.checkpoints.advance(self, workers, now)

    def _advance_initialising(self, shards: list[Session], now: float) -> None:
        if self.layout is not None and not self.failover.is_placed:
            self._place(shards, now)
        if not self.failover.is_placed or self.book.left("initialise"):
            return
        reports = self._serving_reports(shards)
        if reports is not None and all(report.initialised_blocks == report.blocks for report in reports):
            self.enter("training", now)

    def _advance_draining(self, shards: list[Session], workers: list[Session], now: float) -> None:
        """Over when all residuals are in, and the shards have spoken since and published what they hold."""
        if not all(map(self._has_drained, workers)):
            self._drained_at = None
            return
        if self._drained_at is None:
            self._drained_at = now
        reports = self._serving_reports(shards, self._drained_at)
        if reports is not None and not any(report.unpublished for report in reports):
            self.enter("evaluating", now)

    def _advance_exporting(self, shards: list[Session], now: float) -> None:
        if not self.export.is_complete:
            if self.book.left("export") == 0:
                self.fail("a worker called the export done before its bytes had arrived; submit the job again", now)
            return
        # The result counts every update: the shards have spoken since the last one was acknowledged (draining).
        self.enter("done", now)

    def _place(self, shards: list[Session], now: float) -> None:
        assert self.layout is not None
        needs = self.job.cluster.shards
        if len(shards) < needs:
            return
        here = {session.name: holder_of(session) for session in shards}
        try:
            placement = place(self.layout, here, needs, has_backups=self.job.durability.backups > 0)
        except PlacementError as error:
            self.fail(str(error), now)
            return
        self.failover.begin(placement, self.layout)
        self._store_placement(placement)

    def _store_placement(self, placement: Placement) -> None:
        assert self.layout is not None
        body = {
            "layout": msgspec.to_builtins(self.layout),
            "examples": self.examples,
            "parts": msgspec.to_builtins(placement.parts),
        }
        self._effects.append(SaveDocument(self.record.id, "placed", body))

    def has_enough_steps(self) -> bool:
        return self.job.stop.steps is not None and self.steps() >= self.job.stop.steps

    def steps(self) -> int:
        """Of all workers together; what a dead one did not report is missing."""
        here = self.checkpoints.steps_before + self.telemetry.steps
        return max(here, int(self.leasing.sums.get("train", {}).get("steps", 0)))

    def waits_for(self, shards: list[Session], workers: list[Session]) -> str:
        """What the job cannot go on without, in words; empty when nothing is missing."""
        if self.state in FINAL_STATES:
            return ""
        if not self.failover.is_placed and len(shards) < self.job.cluster.shards:
            return f"waiting for shards: {len(shards)} of {self.job.cluster.shards} are here"
        if away := self.failover.waits_for():
            return away
        if holding := self.telemetry.holding_back():
            return "; ".join(f"{name} holds back acknowledgements: {why}" for name, why in holding.items())
        return "" if workers else "waiting for workers: none is alive"

    # ---------------------------------------------------------------------------- what is heard

    def _own_report(self, session: Session) -> WorkerReport | None:
        report = session.report
        return report if isinstance(report, WorkerReport) and report.job == self.record.id else None

    def _has_drained(self, worker: Session) -> bool:
        """Whether nothing more is to come from the worker; one that never had a lease has nothing to flush."""
        report = self._own_report(worker)
        return report.drained if report is not None else not worker.pending

    def hear_shard(self, session: Session, report: ShardReport, now: float) -> None:
        for part in report.parts:
            if part.job == self.record.id:
                self._hear_part(session, part, now)
        self.telemetry.take_shard(session.name, session.incarnation, report)

    def _hear_part(self, session: Session, report: PartReport, now: float) -> None:
        placed = self.failover.part(report.part)
        role = None if placed is None else self.failover.role_of(session, placed)
        if placed is None or report.term > placed.term or report.initialised_blocks > report.blocks:
            self._count("inconsistent-report")
        elif role is None:
            pass  # it held the part once, and has not heard yet that it does not any more
        elif report.failed:
            self.failover.unfit(session, placed, report.failed, now)
            if role == "primary" and not placed.is_synced:
                self.fail(f"{session.name!r} says: {report.failed}", now)
        elif (role, placed.term) != (report.role, report.term):
            pass  # its order is on the way
        elif role == "backup":
            self.telemetry.backups[placed.name] = report
            self.failover.hear_backup(placed, report, now)
        elif report.blocks != len(placed.blocks):
            self._count("inconsistent-report")
        else:
            self._hear_primary(session, placed, report, now)

    def _hear_primary(self, session: Session, placed: PlacedPart, report: PartReport, now: float) -> None:
        before = self.telemetry.parts.get(placed.name)
        has_begun = self.state in ACTIVE_STATES[1:]
        # A backup that took over has what was acknowledged, which may be less than the last primary reported.
        told = before is not None and before.initialised_blocks and not placed.failovers
        wanted = report.blocks if has_begun else before.initialised_blocks if told and before else 0
        if report.initialised_blocks < wanted:
            self.fail(self.failover.lost_values(placed), now)
            return
        self.telemetry.take_part(session.name, session.incarnation, report)
        away = self.failover.hear(session, placed, report, now)
        if away is not None and away.then == "waits":
            self.shards_recovered.append(session.name)
        if away is not None:
            self.save_progress(now)

    def shard_lost(self, session: Session, now: float) -> None:
        """Its session has ended; what follows is decided when the job moves on."""
        self.failover.lost(session, now)

    def worker_lost(self, session: Session, now: float) -> None:
        if self.book.release(session.name) or self._own_report(session) is not None:
            self.workers_lost.append(session.name)
        self.checkpoints.worker_lost(self._own_report(session))
        self.leasing.forget_worker(session.name)
        self.save_progress(now)

    def hear_worker(self, session: Session, report: WorkerReport, seen: int, now: float) -> list[int]:
        """Take in a worker's report. Returns the numbers of the leases that it may forget."""
        if report.job != self.record.id:
            return []
        self.telemetry.take_worker(session.name, session.incarnation, report)
        if report.failed:
            self.fail(f"{session.name!r} says: {report.failed}", now)
            return []
        self._take_declaration(session, report, now)
        confirmed = self.leasing.take_results(session, report.done)
        confirmed += self.leasing.compare(session, report, seen)
        self.save_leases_if_changed(now)
        return confirmed

    def _take_declaration(self, session: Session, report: WorkerReport, now: float) -> None:
        if report.layout is None or self.state != "initialising" or session.name not in self.book.holders("initialise"):
            return
        if self.layout is not None:
            if report.layout != self.layout or report.examples != self.examples:
                self.fail(
                    f"{session.name!r} declares another model or other data than the worker before it: the machines "
                    "do not have the same code, data or library versions; make them equal",
                    now,
                )
            return
        try:
            check_layout(report.layout)
        except LayoutError as error:
            self._count("wrong-layout")
            self.fail(f"{session.name!r} declared a layout that no model has: {error}", now)
            return
        for way, rules in (("push", self.job.push.layers), ("pull", self.job.pull.layers)):
            if missing := unmatched(report.layout, rules):
                names = ", ".join(parameter.name for parameter in report.layout.parameters[:20])
                self.fail(
                    f"{way}.layers: {missing[0]!r} matches no parameter and no group of the model; its first "
                    f"parameters are {names}",
                    now,
                )
                return
        try:
            self._set_layout(report.layout, dict(report.examples))
        except LeaseError as error:
            self.fail(f"{session.name!r} declared {error}", now)

    def _set_layout(self, layout: Layout, examples: dict[str, int]) -> None:
        self.book.declare(examples)
        self.leasing.limit_training()  # after a restart: what is done says how much is left
        self.layout, self.examples = layout, examples

    # -------------------------------------------------------------------------------- orders

    def members(self, workers: list[Session]) -> tuple[Member, ...]:
        """The workers that count for consistency: those that hold training leases now."""
        # Who stops for a checkpoint pushes nothing until the others have stopped: nobody may wait for anybody then.
        if self.state != "training" or self.checkpoints.cuts.for_workers:
            return ()
        holders = self.book.holders("train")
        return tuple(Member(worker.name, worker.incarnation) for worker in workers if worker.name in holders)

    def shard_stamp(self, session: Session, workers: list[Session]) -> Stamp:
        """What the shard's order depends on."""
        resumes = self.checkpoints.resume is not None and self.state == "initialising"
        return self._orders.stamp(session, self.members(workers), workers, self.checkpoints.cuts.for_parts, resumes)

    def shard_order(self, session: Session, workers: list[Session]) -> ShardOrder | None:
        return self._orders.order(session, self.shard_stamp(session, workers))

    def addresses(self) -> tuple[PartAddress, ...]:
        """Where workers find the parts."""
        if self._addresses[0] != self.failover.revision:
            self._addresses = self.failover.revision, addresses(self.failover.parts)
        return self._addresses[1]

    def is_placed(self, shards: list[Session]) -> bool:
        """Whether workers may be sent to the shards: the blocks are placed and every part is served."""
        if not self.failover.is_placed:
            return False
        return self.state != "initialising" or self._serving_reports(shards) is not None

    def _serving_reports(self, shards: list[Session], since: float = -math.inf) -> list[PartReport] | None:
        """The reports of all parts; None while one of them is not served, or was not reported after `since`."""
        here = {session.name: session for session in shards}
        reports = []
        for part in self.failover.parts:
            report, session = self.telemetry.parts.get(part.name), here.get(part.primary.shard)
            if report is None or report.term != part.term or self.failover.is_away(part.name):
                return None
            if session is None or not is_held_by(part.primary, session) or session.heard_at <= since:
                return None
            reports.append(report)
        return reports

    def stage_of(self, worker: Session, workers: list[Session]) -> str | None:
        """What the worker should be doing, or None for nothing. Only one initialises and only one exports."""
        if self.state in ("training", "draining", "evaluating"):
            return {"training": "train", "draining": "drain", "evaluating": "evaluate"}[self.state]
        kind = KIND_OF_STATE.get(self.state)
        if kind is None:
            return None
        holder = next(iter(self.book.holders(kind)), None) or (workers[0].name if workers else None)
        if worker.name == holder:
            return kind
        # The others keep the job at hand: one of them exports when the holder dies.
        return "evaluate" if kind == "export" else None

    def worker_order(
        self, worker: Session, shards: list[Session], workers: list[Session], now: float
    ) -> WorkerOrder | None:
        """The worker's order, with new grants where it has room."""
        stage = self.stage_of(worker, workers)
        if stage is None:
            return None
        kind = KIND_OF_STATE.get(self.state)
        hold = 0
        if kind is not None and (kind in ("train", "evaluate") or stage == kind):
            others = [one.name for one in workers]
            hold = 2**31 if self.is_settling(now) else self.leasing.top_up(worker, others, kind, now)
            self.save_leases_if_changed(now)
        is_placed = self.is_placed(shards)
        return WorkerOrder(
            job=self.record.id,
            specification=self.record.specification,
            stage=stage,  # type: ignore[arg-type]
            phase=0,
            layout=self.layout if is_placed else None,
            placement=self.addresses() if is_placed else (),
            grants=tuple(lease for _, lease in worker.pending.values() if kind == lease.kind),
            hold=hold,
            checkpoint=self.checkpoints.cuts.for_workers,
            resumes=self.checkpoints.offers(worker),
        )

    # -------------------------------------------------------------------------------- export

    def store_part(self, peer: Peer, part: ExportPart, data: memoryview, now: float) -> None:
        """Take a piece of the model in order; the answer says how much is stored, whatever was sent."""
        described = self.book.describe(part.lease)
        is_export = self.state == "exporting" and described is not None and described[0] == "export"
        if not is_export or not self.book.adopt(part.name, part.lease):
            self._count("unknown-lease")
            return
        was_complete = self.export.is_complete
        effects = self.export.take(part, data)
        if not effects:
            self._count("export-out-of-order")
        self._effects += effects
        if self.export.is_complete and not was_complete:
            self.save_progress(now)
        stored = ExportStored(job=self.record.id, lease=part.lease, stored=self.export.stored)
        self._effects.append(Send(peer, stored))
