"""A job's leases between the book and what workers report: grants repeated until seen, results counted once.

A heartbeat is compared with the book and the book is put right: a grant that was seen but is neither held nor
done is free again, a lease that a worker holds from before a restart of the coordinator is adopted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import msgspec

from paramserver.coordinator.checkpoints.resume import ResumedFrom
from paramserver.coordinator.effects import Effect, LeaseResult, SaveDone
from paramserver.coordinator.sessions import Session
from paramserver.job import Job, lease_examples_of
from paramserver.protocol.messages import LeaseDone, WorkerReport
from paramserver.router.horizon import Speed, fair_hold
from paramserver.router.leases import Kind, LeaseBook, LeaseState

GRANT_EXAMPLES = 100_000  # in one order, so that it stays far below the largest message


class Leasing:
    """Of one job.

    Args:
        effects, count: shared with the core: facts to store; a peer's inconsistent message, by name.
        progress: what `progress` of an earlier coordinator's Leasing returned; empty for a new job.
        results: the leases that it had recorded as done.
        resumed: what a run that goes on from a checkpoint begins with.
    """

    def __init__(
        self,
        job_id: str,
        job: Job,
        effects: list[Effect],
        count: Callable[[str], None],
        progress: Mapping[str, Any],
        results: Iterable[LeaseResult],
        resumed: ResumedFrom | None = None,
    ) -> None:
        results = list(results)
        stored = progress.get("leases")
        state = msgspec.convert(stored, LeaseState) if stored else None
        done = [result.done.number for result in results]
        self._job_id = job_id
        self._effects = effects
        self._count = count
        self._wanted_steps = job.stop.steps
        self._lease_examples = lease_examples_of(job)
        if resumed is not None:
            state = state or resumed.leases.state()
            done += resumed.leases.done(job.stop.epochs * -(-resumed.examples["train"] // self._lease_examples))
        self.book = LeaseBook(
            batch=self._lease_examples,
            epochs=job.stop.epochs,
            seed=job.seed,
            state=state,
            done=done,
            sources=("weights",) if job.pull.is_fresh else ("weights", "replica"),
        )
        self.sums: dict[str, dict[str, float]] = {}
        """By split: leases, examples, steps, elements, loss_sum (nats), skipped_steps of what is done."""
        self.metric_sums: dict[str, dict[str, float]] = {}
        """By split: the task's own metrics by name, summed over the same elements."""
        self.warnings: list[str] = list(progress.get("warnings", []))
        self._speeds: dict[str, Speed] = {}
        self._finished: dict[str, int] = {}  # leases done by worker since its speed was looked at
        if resumed is not None:
            self.sums = {split: dict(sums) for split, sums in resumed.sums.items()}
            self.metric_sums = {split: dict(sums) for split, sums in resumed.metric_sums.items()}
        for result in results:
            self._add(result)
        self._saved = self.book.state

    @property
    def has_changed(self) -> bool:
        """Whether a successor would not know the newest lease numbers."""
        return self.book.state != self._saved

    def progress(self) -> dict[str, Any]:
        """What a successor needs; the caller stores it."""
        self._saved = self.book.state
        return {"leases": asdict(self._saved), "warnings": self.warnings}

    def forget_speeds(self) -> None:
        """Another kind of lease follows: its speed is another."""
        self._speeds.clear()
        self._finished.clear()

    def forget_worker(self, name: str) -> None:
        self._speeds.pop(name, None)
        self._finished.pop(name, None)

    def limit_training(self) -> None:
        """Leases are of one length, so those that are done say how many of them make `stop.steps`."""
        sums = self.sums.get("train", {})
        if self._wanted_steps is not None and sums.get("steps"):
            self.book.limit_training(math.ceil(self._wanted_steps * sums["leases"] / sums["steps"]))

    def take_results(self, session: Session, results: Iterable[LeaseDone]) -> list[int]:
        """Count each lease once. Returns the numbers that the worker may forget.

        A refused result is forgotten too: repeating it would not make it true.
        """
        confirmed = []
        for done in results:
            confirmed.append(done.number)
            described = self.book.describe(done.number)
            outcome = self.book.finish(session.name, done.number)
            if described is None or outcome == "unknown":
                self._count("unknown-lease")
            elif outcome == "late":
                self._count("late-lease")
            elif outcome == "done":
                session.pending.pop(done.number, None)
                self._record(session.name, LeaseResult(*described, done))
        return confirmed

    def _record(self, worker: str, result: LeaseResult) -> None:
        done = result.done
        if not math.isfinite(done.loss_sum) or not all(map(math.isfinite, done.metrics.values())):
            # The work is done, but such a sum would spoil all the others: it counts for nothing.
            self._count("not-finite-result")
            self.warnings.append(f"{worker!r} reported a loss of split {result.split!r} that is not finite")
            done = LeaseDone(done.number, steps=done.steps, skipped_steps=done.skipped_steps)
            result = LeaseResult(result.kind, result.split, result.examples, done)
        self._add(result)
        if result.kind == "train":
            self.limit_training()
        self._finished[worker] = self._finished.get(worker, 0) + 1
        self._effects.append(SaveDone(self._job_id, result))

    def _add(self, result: LeaseResult) -> None:
        if result.kind not in ("train", "evaluate"):
            return
        sums = self.sums.setdefault(result.split, {})
        for name, value in (
            ("leases", 1),
            ("examples", result.examples),
            ("steps", result.done.steps),
            ("elements", result.done.elements),
            ("loss_sum", result.done.loss_sum),
            ("skipped_steps", result.done.skipped_steps),
        ):
            sums[name] = sums.get(name, 0) + value
        metrics = self.metric_sums.setdefault(result.split, {})
        for name, value in result.done.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value

    def compare(self, session: Session, report: WorkerReport, seen: int) -> list[int]:
        """Bring the book in line with what the worker holds. Call after `take_results`.

        Returns the numbers that it must forget: it was given up for a while, and they are done or another's now.
        One that it has begun it may end; the result is late. It would never begin the others while they take the
        room of its new grants, and hand those back as fast as they come.
        """
        begun = set(report.begun)
        self.book.give_back(session.name, report.returned, begun)
        for number in report.returned:
            session.pending.pop(number, None)
        held = set(report.held)
        stale = {
            number
            for number in held
            if session.pending.pop(number, None) is None and not self.book.adopt(session.name, number)
        }
        for _ in stale - session.stale:  # a lease counts once, however often it is told
            self._count("stale-lease")
        session.stale = stale
        self.book.begin(session.name, begun)
        for number in self.book.held_by(session.name):
            if number in held:
                continue
            pending = session.pending.get(number)
            # It held the lease and does not any more, or has seen the grant and does not hold it.
            if pending is None or 0 < pending[0] <= seen:
                session.pending.pop(number, None)
                self.book.give_back(session.name, [number])
        return sorted(stale - begun)

    def top_up(self, worker: Session, others: Iterable[str], kind: Kind, now: float) -> int:
        """Grant what the worker has room for, into `worker.pending`. Returns how many it may hold.

        `others` are the names of all live workers.
        """
        holding = self.book.holders(kind).get(worker.name, 0)
        hold = 1
        if kind in ("train", "evaluate"):
            speed = self._speeds.setdefault(worker.name, Speed())
            speed.observe(self._finished.pop(worker.name, 0), holding > 0, now)
            speeds = {name: self._speeds[name].leases_a_second if name in self._speeds else None for name in others}
            speeds[worker.name] = speed.leases_a_second
            hold = fair_hold(worker.name, self.book.left(kind), speeds)
        room = min(hold - holding, max(1, GRANT_EXAMPLES // self._lease_examples))
        for lease in self.book.grant(kind, worker.name, room):
            worker.pending[lease.number] = (0, lease)
        return hold
