"""One job from its turn in the queue to its end: its states, its leases, and what each process should be doing.

The states and what ends each are in docs/architecture.md. Nothing here waits or sends: the core feeds it what
processes report and asks it for their orders; facts to store are appended to `effects`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any, cast

import msgspec

from paramserver.coordinator.effects import (
    Effect,
    JobRecord,
    LeaseResult,
    SaveDocument,
    SaveJob,
    Send,
)
from paramserver.coordinator.exporting import ModelExport
from paramserver.coordinator.leasing import Leasing
from paramserver.coordinator.placement import PlacedShard, Placement, PlacementError, balance
from paramserver.coordinator.sessions import Session
from paramserver.coordinator.telemetry import Telemetry
from paramserver.encoding.layers import unmatched
from paramserver.job import Job, symbol_of, unit_of
from paramserver.protocol.layout import Layout, LayoutError, check_layout
from paramserver.protocol.messages import (
    ExportPart,
    ExportStored,
    Member,
    PartAddress,
    PartOrder,
    PartReport,
    ShardOrder,
    ShardReport,
    WorkerKey,
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
RETURN_SECONDS = 10.0  # after a restart of the coordinator, how long a shard may take to be heard again
RECOVERY_SECONDS = 60.0  # how long a shard with a journal may be away before the job fails
TERM = 1  # placements do not change yet


class JobRun:
    """The job whose turn it is.

    Args:
        record: its stored row, state "queued" or, after a restart, an active one.
        effects: shared with the core; what must be stored is appended.
        count: counts a peer's inconsistent message by name.
        documents, results: what an earlier coordinator stored of it.
        settle_seconds: after a restart, how long processes may take to say what they hold before anything moves.
    """

    def __init__(
        self,
        record: JobRecord,
        now: float,
        effects: list[Effect],
        count: Callable[[str], None],
        documents: Mapping[str, Mapping[str, Any]] | None = None,
        results: Iterable[LeaseResult] = (),
        settle_seconds: float = 0.0,
    ) -> None:
        documents = documents or {}
        self.record = record
        self.job = Job.model_validate_json(record.specification)
        self.symbol, self.unit = symbol_of(self.job), unit_of(self.job)
        self.telemetry = Telemetry()
        self.layout: Layout | None = None
        self.examples: dict[str, int] = {}
        self.placement: Placement | None = None
        self.workers_lost: list[str] = []
        self.shards_recovered: list[str] = []
        self._away: dict[str, float] = {}  # shards whose journal is waited for, and since when
        self._fingerprint = ""
        self._shard_orders: dict[str, ShardOrder] = {}
        self._effects = effects
        self._count = count
        self._entered = now
        self._settled_at = now + settle_seconds
        self._shards_due_at = now + (RETURN_SECONDS if settle_seconds else 0.0)
        self._drained_at: float | None = None
        self.seconds: dict[str, float] = {}
        self._restore(documents, list(results))

    # ------------------------------------------------------------------------------ restoring

    def _restore(self, documents: Mapping[str, Mapping[str, Any]], results: list[LeaseResult]) -> None:
        progress, placed = documents.get("progress", {}), documents.get("placed")
        self.leasing = Leasing(self.record.id, self.job, self._effects, self._count, progress, results)
        self.book = self.leasing.book
        self.seconds = dict(progress.get("seconds", {}))
        self.workers_lost = list(progress.get("workers_lost", []))
        self.shards_recovered = list(progress.get("shards_recovered", []))
        self.export = ModelExport(self.record.id, bool(progress.get("is_exported", False)))
        if placed is not None:
            self._set_layout(msgspec.convert(placed["layout"], Layout), dict(placed["examples"]))
            shards = tuple(msgspec.convert(shard, PlacedShard) for shard in placed["shards"])
            self.placement = Placement(placed["term"], shards)

    def save_progress(self, now: float) -> None:
        body = {
            **self.leasing.progress(),
            "seconds": self.seconds_by_state(now),
            "workers_lost": self.workers_lost,
            "shards_recovered": self.shards_recovered,
            "is_exported": self.export.is_complete,
        }
        self._effects.append(SaveDocument(self.record.id, "progress", body))

    def save_leases_if_changed(self, now: float) -> None:
        """Call before any order is sent: a lease number must be known to a successor before it leaves."""
        if self.leasing.has_changed:
            self.save_progress(now)

    # -------------------------------------------------------------------------------- states

    @property
    def state(self) -> str:
        return self.record.state

    def seconds_by_state(self, now: float) -> dict[str, float]:
        seconds = dict(self.seconds)
        seconds[self.state] = seconds.get(self.state, 0.0) + max(0.0, now - self._entered)
        return seconds

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
        if self.state in FINAL_STATES or self.is_settling(now):
            return
        self._miss_shards(shards, now)
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

    def _advance_initialising(self, shards: list[Session], now: float) -> None:
        if self.layout is not None and self.placement is None:
            self._place(shards, now)
        if self.placement is None or self.book.left("initialise"):
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
        placed = [session for session in shards if self._placed(session.name) and session.name not in self._away]
        is_published = all(
            session.heard_at > self._drained_at
            and isinstance(session.report, ShardReport)
            and any(part.job == self.record.id and not part.unpublished for part in session.report.parts)
            for session in placed
        )
        if self.placement is not None and len(placed) == len(self.placement.shards) and is_published:
            self.enter("evaluating", now)

    def _advance_exporting(self, shards: list[Session], now: float) -> None:
        if not self.export.is_complete:
            if self.book.left("export") == 0:
                self.fail("a worker called the export done before its bytes had arrived; submit the job again", now)
            return
        # The result counts every update: the shards have spoken since the last one was acknowledged (draining).
        self.enter("done", now)

    def _miss_shards(self, shards: list[Session], now: float) -> None:
        """Shards that were not heard of again in time, after their own death or the coordinator's."""
        if self.placement is None or now < self._shards_due_at:
            return
        here = {session.name for session in shards}
        for shard in self.placement.shards:
            if shard.name in here and shard.name not in self._away:
                continue
            if not self.has_journal:
                self.fail(self._lost_shard(shard, "it did not come back after the coordinator's restart"), now)
            elif now - self._away.setdefault(shard.name, now) > RECOVERY_SECONDS:
                self.fail(self._lost_shard(shard, f"it did not come back within {RECOVERY_SECONDS:.0f} s"), now)

    def _place(self, shards: list[Session], now: float) -> None:
        assert self.layout is not None
        if len(shards) < self.job.cluster.shards:
            return
        try:
            placed = balance(self.layout, [session.name for session in shards], self.job.cluster.shards)
        except PlacementError as error:
            self.fail(str(error), now)
            return
        here = {session.name: session for session in shards}
        self.placement = Placement(
            TERM,
            tuple(
                PlacedShard(name, here[name].incarnation, here[name].address, blocks, here[name].key)
                for name, blocks in placed.items()
            ),
        )
        self._save_placement()

    def _save_placement(self) -> None:
        assert self.layout is not None
        assert self.placement is not None
        body = {
            "layout": msgspec.to_builtins(self.layout),
            "examples": self.examples,
            "term": self.placement.term,
            "shards": [asdict(shard) for shard in self.placement.shards],
        }
        self._effects.append(SaveDocument(self.record.id, "placed", body))

    def has_enough_steps(self) -> bool:
        return self.job.stop.steps is not None and self.steps() >= self.job.stop.steps

    def steps(self) -> int:
        """Of all workers together; what a dead one did not report is missing."""
        return max(self.telemetry.steps, int(self.leasing.sums.get("train", {}).get("steps", 0)))

    def waits_for(self, shards: list[Session], workers: list[Session]) -> str:
        """What the job cannot go on without, in words; empty when nothing is missing."""
        if self.state in FINAL_STATES:
            return ""
        if self.placement is None and len(shards) < self.job.cluster.shards:
            return f"waiting for shards: {len(shards)} of {self.job.cluster.shards} are here"
        if self._away:
            names = ", ".join(sorted(self._away))
            return f"waiting for {names}, with the journal: start it again under the same name and --state"
        if refusing := self.telemetry.refusing_disks():
            return "; ".join(f"{name} holds back acknowledgements: {why}" for name, why in refusing.items())
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
        self.telemetry.shards[session.name] = report

    def _hear_part(self, session: Session, report: PartReport, now: float) -> None:
        placed = self._placed(session.name)
        if placed is None:
            return
        if report.failed:
            self.fail(f"{session.name!r} says: {report.failed}", now)
            return
        if report.term != TERM or report.blocks != len(placed.blocks) or report.initialised_blocks > report.blocks:
            self._count("inconsistent-report")
            return
        before = self.telemetry.parts.get(session.name)
        self.telemetry.parts[session.name] = report
        wanted = before.initialised_blocks if before is not None else 0
        if report.initialised_blocks < (report.blocks if self.state in ACTIVE_STATES[1:] else wanted):
            self.fail(self._lost_shard(placed, "it has lost their values"), now)
        elif self._away.pop(session.name, None) is not None:
            self.shards_recovered.append(session.name)
            self.save_progress(now)

    def shard_joined(self, session: Session, now: float) -> None:
        """A shard registered; under another incarnation than the placed one it has what is in its journal, or nothing.

        The term stays: the blocks are placed on the same shard, and its journal is held by one process at a time.
        """
        placed = self._placed(session.name)
        if placed is None or placed.incarnation == session.incarnation or self.placement is None:
            return
        if not self.has_journal:
            self.fail(self._lost_shard(placed, "another process took its name"), now)
            return
        successor = replace(placed, incarnation=session.incarnation, address=session.address, key=session.key)
        shards = tuple(successor if shard is placed else shard for shard in self.placement.shards)
        self.placement = replace(self.placement, shards=shards)
        self._away.setdefault(session.name, now)
        self._save_placement()

    def shard_lost(self, session: Session, seconds: float, now: float) -> None:
        placed = self._placed(session.name)
        if placed is None or self.state not in ACTIVE_STATES:
            return
        if self.has_journal:
            self._away.setdefault(session.name, now)
        else:
            self.fail(self._lost_shard(placed, f"it was not heard of for {seconds:.1f} s"), now)

    @property
    def has_journal(self) -> bool:
        """Whether a shard that is started again knows what it acknowledged."""
        return self.job.durability.log != "none"

    def _lost_shard(self, shard: PlacedShard, how: str) -> str:
        assert self.layout is not None
        lost = sum(4 * self.layout.blocks[block].elements for block in shard.blocks)
        mend = "submit the job again" + (
            "" if self.has_journal else "; durability {log: journal} survives such a death"
        )
        return (
            f"{shard.name!r} died ({how}) and with it {len(shard.blocks)} of {len(self.layout.blocks)} blocks, "
            f"{lost / 1e6:.1f} MB of weights; there are no backups yet: start the shard again and {mend}"
        )

    def worker_lost(self, session: Session, now: float) -> None:
        if self.book.release(session.name) or self._own_report(session) is not None:
            self.workers_lost.append(session.name)
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
        self.layout, self.examples, self._fingerprint = layout, examples, layout.fingerprint

    # -------------------------------------------------------------------------------- orders

    def _placed(self, name: str) -> PlacedShard | None:
        shards = self.placement.shards if self.placement else ()
        return next((shard for shard in shards if shard.name == name), None)

    def members(self, workers: list[Session]) -> tuple[Member, ...]:
        """The workers that count for consistency: those that hold training leases now."""
        if self.state != "training":
            return ()
        holders = self.book.holders("train")
        return tuple(Member(worker.name, worker.incarnation) for worker in workers if worker.name in holders)

    def shard_order(self, session: Session, workers: list[Session]) -> ShardOrder | None:
        placed = self._placed(session.name)
        if placed is None or self.layout is None or placed.incarnation != session.incarnation:
            return None
        members = self.members(workers)
        keys = tuple(WorkerKey(worker.name, worker.incarnation, worker.key) for worker in workers if worker.key)
        known = self._shard_orders.get(session.name)
        # The same object while nothing changes: comparing and sending it again costs nothing.
        if known is None or (known.parts[0].members, known.parts[0].workers) != (members, keys):
            part = PartOrder(
                part=placed.name,
                job=self.record.id,
                specification=self.record.specification,
                term=TERM,
                phase=0,
                layout=self.layout,
                blocks=placed.blocks,
                members=members,
                workers=keys,
            )
            known = self._shard_orders[session.name] = ShardOrder((part,))
        return known

    def addresses(self) -> tuple[tuple[str, str], ...]:
        """Where workers find the shards, and the keys that these prove to hold there."""
        return () if self.placement is None else tuple((shard.address, shard.key) for shard in self.placement.shards)

    def is_placed(self, shards: list[Session]) -> bool:
        """Whether workers may be sent to the shards: the blocks are placed and every shard serves its own."""
        if self.placement is None:
            return False
        return self.state != "initialising" or self._serving_reports(shards) is not None

    def _serving_reports(self, shards: list[Session]) -> list[PartReport] | None:
        """The reports of all placed shards, or None while one of them does not serve its order."""
        assert self.placement is not None
        reports = [self.telemetry.parts.get(shard.name) for shard in self.placement.shards]
        if any(report is None for report in reports) or not shards:
            return None
        return cast(list[PartReport], reports)

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
        shards_placed = self.placement.shards if self.placement and is_placed else ()
        return WorkerOrder(
            job=self.record.id,
            specification=self.record.specification,
            stage=stage,  # type: ignore[arg-type]
            phase=0,
            layout=self.layout if is_placed else None,
            placement=tuple(
                PartAddress(shard.name, shard.address, shard.blocks, TERM, shard.key) for shard in shards_placed
            ),
            grants=tuple(lease for _, lease in worker.pending.values() if kind == lease.kind),
            hold=hold,
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
