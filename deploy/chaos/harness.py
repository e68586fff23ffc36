"""One job on one cluster, tormented by a schedule or left alone, from its start to the proof of what became of it.

One thread does everything in turn: it starts again what died, follows journals and accounts, fires what is due. Faults
are done one after another; the next one comes at its time, whether or not the one before has been recovered from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.api import Api, ApiError
from deploy.chaos.cluster import ChaosCluster
from deploy.chaos.faults import Evidence, Fault, make_fault
from deploy.chaos.journals import JournalTap
from deploy.chaos.proof import Noted, Proof, prove_files
from deploy.chaos.schedule import Planned
from deploy.chaos.watch import (
    TRAINING,
    Recovery,
    Sample,
    Status,
    StatusWatch,
    Throughput,
    acknowledged_by_worker,
    throughput,
)
from deploy.chaos.wires import Wires
from deploy.local import Death, StoppedEarlyError, Topology
from deploy.supervision import Supervision
from paramserver.job import Job
from paramserver.process import StopRequest

TICK_SECONDS = 0.1
SAMPLE_SECONDS = 0.2
TARGET_SECONDS = 30.0  # that a fault waits for its target to run again
PROOF_SECONDS = 15.0  # that a fault may take to show that it happened
BEGIN_SECONDS = 180.0  # that a job may take to begin training
END_SECONDS = 300.0  # beyond its time, that it may take to end
WARM_STEPS = 20  # of every worker, before anything is measured
FINAL = ("done", "failed", "cancelled")

Tell = Callable[[str], None]


class ChaosError(Exception):
    """The run cannot go on, so it proves nothing. The text says why."""


@dataclass(frozen=True)
class Outcome:
    """What became of one planned fault."""

    planned: Planned
    fired_at_seconds: float | None  # after training began; None: it was not fired
    evidence: Evidence
    recovery_seconds: float | None  # from when it fired until everybody worked again; None: not seen
    restart_cpu_seconds: float = 0.0


@dataclass
class Run:
    """One job that was run to its end."""

    job: str
    result: dict[str, Any]
    throughput: Throughput
    proof: Proof
    noted: Noted
    outcomes: list[Outcome] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)

    @property
    def restart_cpu_seconds(self) -> float:
        return sum(outcome.restart_cpu_seconds for outcome in self.outcomes)


@contextmanager
def chaos_cluster(directory: Path, topology: Topology, stop: StopRequest) -> Iterator[ChaosCluster]:
    """A started cluster behind its relay; both end with the block. Raises EngineError, StoppedEarlyError."""
    directory.mkdir(parents=True, exist_ok=True)
    with Wires(directory / "relay.log") as wires, ChaosCluster(directory, topology, wires) as cluster:
        cluster.start(stop)
        yield cluster


class Tormentor:
    """Runs one job at a time on a started cluster. Used from one thread.

    Args:
        stop: ends a run early, with StoppedEarlyError.
        tell: is told one line an event.
    """

    def __init__(self, cluster: ChaosCluster, stop: StopRequest, tell: Tell) -> None:
        self._cluster = cluster
        self._stop = stop
        self._tell = tell
        self._supervision = Supervision(cluster)
        self._deaths: list[Death] = []
        self._samples: list[Sample] = []
        self._open: list[Recovery] = []
        self._tap: JournalTap | None = None
        self._job = ""
        self._blocks = 0
        self._sampled_at = 0.0
        self._pids: dict[str, int] = {}

    # ---------------------------------------------------------------------------------- runs

    def steps_a_second(self, job: Job, seconds: float) -> float:
        """How fast the cluster trains such a job, measured for so long; the job is cancelled then."""
        with StatusWatch(self._cluster.url, self._cluster.token()) as watch:
            self._submit(job)
            begun = self._await_training(watch)
            self._pause(watch, seconds)
            ended = self._status(watch)
            self._cancel(watch)
        elapsed = float(ended.body["uptime_seconds"]) - float(begun.body["uptime_seconds"])
        return float(ended.job["steps"] - begun.job["steps"]) / elapsed

    def run(self, job: Job, schedule: Sequence[Planned], seconds: float) -> Run:
        """Train a job to its end under a schedule, stop the cluster, and prove what became of its updates.

        `seconds` is how long it should about train. Raises ChaosError, AuditError, EngineError, StoppedEarlyError.
        """
        outcomes: list[Outcome] = []
        with StatusWatch(self._cluster.url, self._cluster.token()) as watch:
            self._submit(job)
            self._tap = JournalTap(self._cluster.shard_state, self._job, self._cluster.directory / "journals")
            self._await_training(watch)
            began = time.monotonic()
            recoveries = []
            for planned in schedule:
                self._await_time(watch, began + planned.at_seconds)
                outcome, recovery = self._strike(planned, watch, began)
                outcomes.append(outcome)
                recoveries.append(recovery)
            self._end_job(watch, began + seconds + END_SECONDS)
            self._close_recoveries(watch)
        self._cluster.stop()
        proof, noted = prove_files(self._cluster.accounts, self._job, self._tap)
        windows = [(one.fired_at, one.recovered_at or self._samples[-1].at) for one in recoveries if one is not None]
        return Run(
            job=self._job,
            result=self._result(),
            throughput=throughput(self._samples, windows),
            proof=proof,
            noted=noted,
            outcomes=[_with_recovery(outcome, one) for outcome, one in zip(outcomes, recoveries, strict=True)],
            deaths=self._deaths,
        )

    def _end_job(self, watch: StatusWatch, give_up_at: float) -> None:
        """Wait until the job is over, or cancel it when its time is: what it did is proven all the same."""
        try:
            left = max(END_SECONDS, give_up_at - time.monotonic())
            self._await(watch, lambda status: status.state in FINAL, "the job to end", left)
        except ChaosError as error:
            self._tell(f"{error}; it is cancelled")
            self._cancel(watch)

    def _cancel(self, watch: StatusWatch) -> None:
        self._call(lambda api: api.cancel(self._job))
        self._await(watch, lambda status: status.state in FINAL, "the job to be cancelled", PROOF_SECONDS)

    def _submit(self, job: Job) -> None:
        self._samples.clear()
        self._job = str(self._call(lambda api: api.submit(job.json_text())["id"]))
        self._blocks = 0

    def _result(self) -> dict[str, Any]:
        path = self._cluster.topology.runs / self._job / "result.json"
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result

    # -------------------------------------------------------------------------------- faults

    def _strike(self, planned: Planned, watch: StatusWatch, began: float) -> tuple[Outcome, Recovery | None]:
        fault = self._prepare(planned, watch)
        if fault is None:
            self._tell(f"{planned}: not fired")
            reason = "its target did not run" if self._is_training(watch) else "the job had ended its training"
            return Outcome(planned, None, Evidence(False, reason), None), None
        deaths = len(self._deaths)
        fired_at = time.monotonic()
        before = watch.latest
        fault.begin()
        try:
            self._hold(fault, watch, fired_at, deaths)
        finally:
            fault.end()
        evidence = fault.evidence(self._deaths[deaths:])
        ended_at = time.monotonic() if planned.seconds else fired_at
        counts = acknowledged_by_worker(self._cluster.accounts, self._job)
        recovery = Recovery(planned, fired_at, ended_at, counts, None if before is None else before.age_mark)
        self._open.append(recovery)
        at = fired_at - began
        self._tell(f"{at:7.1f} s  {planned}: {evidence.text}{'' if evidence.has_fired else ' (NOT PROVEN)'}")
        return Outcome(planned, round(at, 2), evidence, None), recovery

    def _await_time(self, watch: StatusWatch, at: float) -> None:
        """Until then; less where there is no training any more."""
        while self._is_training(watch) and (left := at - time.monotonic()) > 0:
            self._pause(watch, min(left, TICK_SECONDS))

    def _prepare(self, planned: Planned, watch: StatusWatch) -> Fault | None:
        """None where the target does not come back in time, or there is no training any more."""
        give_up_at = time.monotonic() + TARGET_SECONDS
        ends = {planned.target, planned.other or planned.target}
        while self._is_training(watch):
            if ends <= self._cluster.pids().keys():
                return make_fault(planned, self._cluster)
            if time.monotonic() > give_up_at:
                break
            self._pause(watch, TICK_SECONDS)
        return None

    def _hold(self, fault: Fault, watch: StatusWatch, fired_at: float, deaths: int) -> None:
        """Let it last as long as is planned, and then until it is proven, within bounds."""
        while True:
            elapsed = time.monotonic() - fired_at
            is_proven = fault.evidence(self._deaths[deaths:]).has_fired
            if elapsed >= fault.planned.seconds and (is_proven or elapsed >= PROOF_SECONDS):
                return
            self._pause(watch, TICK_SECONDS)

    def _close_recoveries(self, watch: StatusWatch) -> None:
        """A job that has come to its end needs no more recovery; one that has not was not recovered."""
        status = watch.latest
        if status is not None and status.state == "done":
            for recovery in self._open:
                recovery.recovered_at = time.monotonic()
        self._open.clear()

    # --------------------------------------------------------------------------------- ticks

    def _pause(self, watch: StatusWatch, seconds: float) -> None:
        """Let time pass, but not unattended."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._tick(watch)
            self._stop.wait(min(TICK_SECONDS, max(0.0, left)))
            if self._stop.is_set():
                raise StoppedEarlyError(self._stop.reason)

    def _tick(self, watch: StatusWatch) -> None:
        for happening in self._supervision.look():
            if happening.outcome in ("died", "left"):
                self._deaths.append(happening.death)
            elif happening.outcome == "given up":
                raise ChaosError(happening.text)
        self._cluster.aim_new()
        self._note_new_processes()
        now = time.monotonic()
        if self._tap is not None:
            self._tap.look()
        if now >= self._sampled_at + SAMPLE_SECONDS:
            self._sampled_at = now
            self._sample(watch, now)

    def _note_new_processes(self) -> None:
        pids = self._cluster.pids()
        for name, pid in pids.items():
            if self._pids.get(name) not in (None, pid):
                for recovery in reversed(self._open):
                    if recovery.planned.target == name:
                        recovery.restarted.append(pid)
                        break
        self._pids.update(pids)

    def _sample(self, watch: StatusWatch, now: float) -> None:
        counts = acknowledged_by_worker(self._cluster.accounts, self._job)
        self._samples.append(Sample(now, sum(counts.values()), bool(self._blocks) and self._is_training(watch)))
        pids = self._cluster.pids()
        for recovery in list(self._open):
            if recovery.look(now, watch.latest, counts, self._blocks, pids):
                self._open.remove(recovery)
                seconds = now - recovery.fired_at
                self._tell(f"           {recovery.planned.kind} {recovery.planned.target}: whole after {seconds:.1f} s")

    # -------------------------------------------------------------------------------- status

    def _is_training(self, watch: StatusWatch) -> bool:
        """As far as is known: a coordinator that does not answer has not ended anything."""
        status = watch.latest
        return status is None or status.job.get("id") != self._job or status.state == TRAINING

    def _status(self, watch: StatusWatch) -> Status:
        return self._await(watch, lambda status: True, "the coordinator to answer", PROOF_SECONDS)

    def _await_training(self, watch: StatusWatch) -> Status:
        """Until every worker has warmed up."""

        def is_warm(status: Status) -> bool:
            workers = status.job.get("workers", {})
            steps = [worker["steps"] for worker in workers.values()]
            return status.state == TRAINING and len(steps) >= self._cluster.topology.workers and min(steps) > WARM_STEPS

        status = self._await(watch, is_warm, "all workers to train", BEGIN_SECONDS)
        self._blocks = int(status.job["blocks"])
        return status

    def _await(self, watch: StatusWatch, is_so: Callable[[Status], bool], what: str, seconds: float) -> Status:
        """The first status of our job of which it is so. Raises ChaosError where it fails, or the time is over."""
        asked_at = time.monotonic()
        while True:
            status = watch.latest
            if status is not None and status.received_at > asked_at and status.job.get("id") == self._job:
                if is_so(status):
                    return status
                if status.state == "failed":
                    raise ChaosError(f"{self._job} failed: {status.job['reason']}")
            if time.monotonic() - asked_at > seconds:
                raise ChaosError(f"waited {seconds:.0f} s in vain for {what}{_shown(status)}")
            self._pause(watch, TICK_SECONDS)

    def _call(self, ask: Callable[[Api], Any]) -> Any:
        with Api(self._cluster.url, token=self._cluster.token()) as api:
            try:
                return ask(api)
            except ApiError as error:
                raise ChaosError(str(error)) from None


def _shown(status: Status | None) -> str:
    if status is None:
        return "; the coordinator has never answered"
    job = status.job
    age = time.monotonic() - status.received_at
    return f"; {age:.0f} s ago the job was {job.get('state')}, {job.get('steps')} steps{_why(job)}"


def _why(job: dict[str, Any]) -> str:
    return f", {job['waiting']}" if job.get("waiting") else ""


def _with_recovery(outcome: Outcome, recovery: Recovery | None) -> Outcome:
    if recovery is None or recovery.recovered_at is None:
        return outcome
    seconds = round(recovery.recovered_at - recovery.fired_at, 2)
    return Outcome(
        outcome.planned, outcome.fired_at_seconds, outcome.evidence, seconds, round(recovery.restart_cpu_seconds, 2)
    )
