"""What the coordinator decides. This file knows no socket, clock, file or thread.

`handle` takes one message and `tick` the time; both return effects to be carried out in order. One job runs
at a time, first in first out. Whatever a peer sends is refused by name and counted; it never raises.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paramserver.coordinator.effects import (
    AppendMetrics,
    Effect,
    JobRecord,
    LeaseResult,
    SaveDocument,
    SaveJob,
    SaveName,
    Send,
    WriteResult,
)
from paramserver.coordinator.lifecycle import ACTIVE_STATES, FINAL_STATES, JobRun
from paramserver.coordinator.report import empty_result, job_figures, job_result, session_figures
from paramserver.coordinator.sessions import SESSION_SECONDS, Session, Sessions
from paramserver.coordinator.telemetry import slim
from paramserver.job import Cluster as ClusterNeeds
from paramserver.job import Job, parse_job
from paramserver.protocol.messages import (
    CheckpointPiece,
    ExportPart,
    Heartbeat,
    Message,
    Orders,
    Refusal,
    RefusalCode,
    Register,
    Registered,
    ShardOrder,
    ShardReport,
    TakeBlock,
    TakeState,
    WorkerOrder,
    WorkerReport,
)
from paramserver.protocol.transport import Peer

METRICS_SECONDS = 1.0
FLUSH_SECONDS = 6.0  # at the end of the cluster: how long shards wait for workers to flush and to be gone
METRICS = (  # of the status, what a line of metrics.jsonl holds
    "seconds",
    "state",
    "steps",
    "examples",
    "examples_repeated",
    "loss",
    "bits",
    "metrics",
    "examples_a_second",
    "updates_a_second",
    "pushed_bytes",
    "pulled_bytes",
    "pushed_bytes_a_second",
    "pulled_bytes_a_second",
    "push_bits_an_element",
    "pull_bits_an_element",
)


class UnknownJobError(KeyError):
    """There is no job of that id."""


class EndedJobError(ValueError):
    """The job is over already; the text says how it ended."""


def _why_unreadable(record: JobRecord, documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Why a stored job cannot be run by this release and with what is installed here; empty where it can."""
    if "parts" not in documents.get("placed", {"parts": ()}):
        return (
            "an earlier release had placed it on its shards, and this one cannot take that over; submit the job again"
        )
    try:
        parse_job(json.loads(record.specification), "its specification")
    except ValueError as error:
        text = "; ".join(str(error).splitlines())
        return f"the restarted coordinator cannot run this job any more: {text}; mend that and submit the job again"
    return ""


@dataclass(frozen=True)
class Stored:
    """What an earlier coordinator left in the store."""

    jobs: tuple[JobRecord, ...] = ()
    incarnations: Mapping[str, int] | None = None
    documents: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None  # job -> kind -> body
    results: Mapping[str, Sequence[LeaseResult]] | None = None  # of jobs that are active
    keys: Mapping[str, str] | None = None  # name -> public key of the last process that carried it


class CoordinatorCore:
    """Args:
    now: monotonic seconds, as in every later call.
    stored: what to go on with; nothing for a new cluster.
    session_seconds: after so long a silence a process is given up.
    """

    def __init__(self, now: float, stored: Stored | None = None, session_seconds: float = SESSION_SECONDS) -> None:
        stored = stored or Stored()
        self.sessions = Sessions(stored.incarnations or {}, session_seconds, keys=stored.keys, now=now)
        self.key_of: Callable[[Peer], str] = lambda peer: ""
        """The public key that a peer has proven to hold; empty where the cluster uses no keys."""
        self.counts: Counter[str] = Counter()
        """Refused or inconsistent messages by name."""
        self.jobs: dict[str, JobRecord] = {record.id: record for record in stored.jobs}
        self.results: dict[str, Mapping[str, Any]] = {}
        self._resumes: dict[str, Mapping[str, Any]] = {}  # of jobs that wait: what they go on from
        self.submissions: dict[str, str] = {}
        """The job of each submitter's key."""
        self._effects: list[Effect] = []
        self._next_number = max((record.number for record in stored.jobs), default=0) + 1
        self._run: JobRun | None = None
        self._counted = Counter[str]()  # `counts` when the running job's turn came
        self._last: JobRun | None = None  # the job that ended last: status goes on showing it
        self._ending_since: float | None = None  # members are told to end
        self._started = now
        self._metrics_at = now
        documents, results = stored.documents or {}, stored.results or {}
        for record in stored.jobs:
            kept = documents.get(record.id, {})
            if "submission" in kept:
                self.submissions[kept["submission"]["key"]] = record.id
            if "result" in kept:
                self.results[record.id] = kept["result"]
            if "resume" in kept and record.state == "queued":
                self._resumes[record.id] = kept["resume"]
            if record.state not in FINAL_STATES and (reason := _why_unreadable(record, kept)):
                failed = replace(record, state="failed", reason=reason)
                self._seal(failed, empty_result(failed))
            elif record.state in ACTIVE_STATES:
                self._run = self._make_run(record, now, kept, results.get(record.id, ()), is_restored=True)

    # ------------------------------------------------------------------------------ messages

    def handle(self, peer: Peer, message: Message, frames: Sequence[memoryview], now: float) -> list[Effect]:
        """One message of a peer; the effects include the answer."""
        match message:
            case Register():
                self._register(peer, message, now)
            case Heartbeat():
                self._hear(peer, message, now)
            case ExportPart():
                self._store_part(peer, message, frames, now)
            case CheckpointPiece() | TakeBlock() | TakeState():
                self._serve_checkpoint(peer, message, frames, now)
            case _:
                detail = f"a coordinator takes no {type(message).__name__}"
                self._refuse(peer, "not-served", detail)
        return self._take_effects()

    def malformed(self, peer: Peer, reason: str) -> list[Effect]:
        """Bytes that are no message."""
        self._refuse(peer, "malformed", reason)
        return self._take_effects()

    def tick(self, now: float) -> list[Effect]:
        """Time passes: sessions end, the next job starts, metrics are due. Call it a few times a second."""
        self._expire(now)
        self._move_on(now)
        if self._run is not None and now - self._metrics_at >= METRICS_SECONDS:
            self._metrics_at = now
            self._effects.append(AppendMetrics(self._run.record.id, self._metrics(self._run, now)))
        return self._take_effects()

    def extend(self, seconds: float) -> None:
        """The loop itself was away for so long. Call it before the messages that waited are handled."""
        self.sessions.extend(seconds)

    def _refuse(self, peer: Peer, code: RefusalCode, detail: str) -> None:
        self.counts[code] += 1
        self._effects.append(Send(peer, Refusal(code=code, detail=detail[:4096])))

    def _count(self, name: str) -> None:
        self.counts[name] += 1

    def _take_effects(self) -> list[Effect]:
        # The list itself is shared with the job's run: it is emptied, never replaced.
        effects = self._effects[:]
        self._effects.clear()
        return effects

    def _register(self, peer: Peer, message: Register, now: float) -> None:
        self._expire(now)
        key = self.key_of(peer)
        known = self.sessions.incarnations.get(message.name), self.sessions.keys.get(message.name, "")
        answer = self.sessions.register(peer, message, now, key)
        if isinstance(answer, Refusal):
            self._refuse(peer, answer.code, answer.detail)
            return
        assert isinstance(answer, Registered)
        if (answer.incarnation, key) != known:
            self._effects.append(SaveName(message.name, answer.incarnation, key))
        self._effects.append(Send(peer, answer))
        self._move_on(now)

    def _is_impostor(self, peer: Peer, name: str) -> bool:
        """Whether a peer speaks in the name of a live process that has another key; it is refused then."""
        if not self.sessions.is_of_another(name, self.key_of(peer)):
            return False
        self._refuse(peer, "wrong-key", f"{name!r} is a live process with another key")
        return True

    def _hear(self, peer: Peer, beat: Heartbeat, now: float) -> None:
        if self._is_impostor(peer, beat.name):
            return
        session = self.sessions.hear(peer, beat, now)
        if session is None:
            detail = f"there is no session of {beat.name!r} with incarnation {beat.incarnation}: register again"
            self._refuse(peer, "unknown-session", detail)
            return
        expected = ShardReport if session.role == "shard" else WorkerReport
        if not isinstance(beat.report, expected):
            self._refuse(peer, "malformed", f"{session.name!r} is a {session.role}, its report is not")
            return
        session.report = slim(beat.report)
        confirmed: list[int] = []
        if self._run is not None:
            if isinstance(beat.report, WorkerReport):
                confirmed = self._run.hear_worker(session, beat.report, beat.seen, now)
            else:
                self._run.hear_shard(session, beat.report, now)
        self._move_on(now, tell=False)
        self._send_orders(session, now, tuple(confirmed))
        self._tell_changes(now)

    def _store_part(self, peer: Peer, part: ExportPart, frames: Sequence[memoryview], now: float) -> None:
        if self._is_impostor(peer, part.name):
            return
        session = self.sessions.get(part.name)
        if session is None or session.incarnation != part.incarnation:
            self._refuse(peer, "unknown-session", f"there is no session of {part.name!r}: register again")
        elif self._run is None or self._run.record.id != part.job:
            self._refuse(peer, "wrong-job", f"job {part.job!r} is not running")
        else:
            self._run.store_part(peer, part, frames[0], now)
            self._move_on(now)

    def _serve_checkpoint(
        self, peer: Peer, message: CheckpointPiece | TakeBlock | TakeState, frames: Sequence[memoryview], now: float
    ) -> None:
        """Pieces of a checkpoint come in, or go out of the one that the job goes on from."""
        if self._is_impostor(peer, message.name):
            return
        session, run = self.sessions.get(message.name), self._run
        is_of_part = isinstance(message, TakeBlock) or (isinstance(message, CheckpointPiece) and message.part)
        role = "shard" if is_of_part else "worker"
        if session is None or session.incarnation != message.incarnation or session.role != role:
            self._refuse(peer, "unknown-session", f"there is no {role} session of {message.name!r}: register again")
        elif run is None or run.record.id != message.job:
            self._refuse(peer, "wrong-job", f"job {message.job!r} is not running")
        else:
            run.checkpoints.serve(run, peer, session, message, frames[0] if frames else None, now)
            self._move_on(now)

    def checkpoint(self, job_id: str, now: float) -> tuple[int, list[Effect]]:
        """Ask for a checkpoint. Returns its number. Raises UnknownJobError, EndedJobError: it does not train."""
        record = self.jobs.get(job_id)
        if record is None:
            raise UnknownJobError(job_id)
        if self._run is None or self._run.record.id != job_id or record.state != "training":
            raise EndedJobError(f"job {job_id!r} is {record.state}: checkpoints are taken while a job is training")
        number = self._run.checkpoints.cuts.request()
        self._move_on(now)
        return number, self._take_effects()

    def checkpoint_over(self, job_id: str, number: int, failure: str, now: float) -> list[Effect]:
        """The files of a checkpoint are durable; or they could not be written, which training does not suffer from."""
        if self._run is not None and self._run.record.id == job_id:
            cuts = self._run.checkpoints.cuts
            if failure and number == cuts.number:
                cuts.give_up(failure, now)
            elif not failure:
                cuts.sealed(number)
            self._move_on(now)
        return self._take_effects()

    def _expire(self, now: float) -> None:
        for session in self.sessions.expire(now):
            if self._run is None:
                continue
            if session.role == "shard":
                self._run.shard_lost(session, now)
            else:
                self._run.worker_lost(session, now)

    # -------------------------------------------------------------------------------- orders

    def _members(self) -> tuple[list[Session], list[Session]]:
        return self.sessions.of("shard"), self.sessions.of("worker")

    def _send_orders(self, session: Session, now: float, confirmed: tuple[int, ...] = ()) -> None:
        shards, workers = self._members()
        order: ShardOrder | WorkerOrder | None = None
        if self._run is not None and session.role == "shard":
            order = self._run.shard_order(session, workers)
        elif self._run is not None:
            order = self._run.worker_order(session, shards, workers, now)
        session.number += 1
        shutdown = self._must_end(session, workers, now)
        for number, (first_order, lease) in session.pending.items():
            if not first_order:
                session.pending[number] = (session.number, lease)
        session.told = self._about(session, shards, workers)
        orders = Orders(number=session.number, order=order, confirmed=confirmed, shutdown=shutdown)
        self._effects.append(Send(session.peer, orders))

    def _about(self, session: Session, shards: list[Session], workers: list[Session]) -> object:
        """What the session's order is about; when that changes it is told at once and not at its next heartbeat."""
        run = self._run
        if run is None:
            return None
        if session.role == "shard":
            order = run.shard_order(session, workers)
            return None if order is None else (run.record.id, run.shard_stamp(session, workers))
        stage = run.stage_of(session, workers)
        if stage is None:
            return None
        return run.record.id, stage, run.is_placed(shards), run.addresses(), run.checkpoints.cuts.for_workers

    def _tell_changes(self, now: float) -> None:
        shards, workers = self._members()
        for session in [*shards, *workers]:
            if session.told != self._about(session, shards, workers):
                self._send_orders(session, now)

    # -------------------------------------------------------------------------- the end of all

    def shut_down(self, now: float) -> list[Effect]:
        """The cluster ends: tell the workers, which flush and hand back, and the shards when no worker is left.

        The running job stays as it is; a coordinator that is started again goes on with it.
        """
        self._ending_since = now if self._ending_since is None else self._ending_since
        for session in self.sessions.of("worker"):
            self._send_orders(session, now)
        return self._take_effects()

    def part_with_members(self) -> list[Effect]:
        """This process ends. Where the cluster does, all that still live are told; else they wait for a successor."""
        if self._ending_since is not None:
            for session in self.sessions.all():
                session.number += 1
                self._effects.append(Send(session.peer, Orders(number=session.number, shutdown=True)))
        return self._take_effects()

    def _must_end(self, session: Session, workers: list[Session], now: float) -> bool:
        if self._ending_since is None:
            return False
        return session.role == "worker" or not workers or now - self._ending_since > FLUSH_SECONDS

    # ---------------------------------------------------------------------------------- jobs

    def _make_run(
        self,
        record: JobRecord,
        now: float,
        documents: Mapping[str, Mapping[str, Any]] | None = None,
        results: Iterable[LeaseResult] = (),
        is_restored: bool = False,
    ) -> JobRun:
        seconds = self.sessions.session_seconds
        return JobRun(record, now, self._effects, self._count, documents, results, seconds, is_restored)

    def _move_on(self, now: float, tell: bool = True) -> None:
        """Advance the running job, seal it when it is over, start the next one."""
        if self._ending_since is not None:
            return  # whoever is not heard of any more has ended as it was told
        shards, workers = self._members()
        for _ in range(len(self.jobs) + 1):
            if self._run is None:
                self._start_next(shards, workers, now)
            if self._run is None:
                break
            self._run.advance(shards, workers, now)
            self.jobs[self._run.record.id] = self._run.record
            if self._run.state not in FINAL_STATES:
                break
            self._end_running(self._run, now)
        if tell:
            self._tell_changes(now)

    def queue(self) -> list[JobRecord]:
        """The jobs that wait for their turn, the next one first."""
        return sorted((job for job in self.jobs.values() if job.state == "queued"), key=lambda job: job.number)

    def _start_next(self, shards: list[Session], workers: list[Session], now: float) -> None:
        queue = self.queue()
        if not queue:
            return
        wanted = Job.model_validate_json(queue[0].specification).cluster
        if len(shards) < wanted.shards or len(workers) < wanted.workers:
            return
        resume = self._resumes.pop(queue[0].id, None)
        run = self._make_run(queue[0], now, {} if resume is None else {"resume": resume})
        run.enter("initialising", now)
        for session in workers:
            session.pending.clear()
        self._run = run
        self._counted = self.counts.copy()
        self._metrics_at = now

    def _seal(self, record: JobRecord, result: Mapping[str, Any]) -> None:
        """Record a job that is over. The result comes first: a job that the store calls over has one."""
        self.results[record.id] = result
        self.jobs[record.id] = record
        self._effects += [WriteResult(record.id, result), SaveDocument(record.id, "result", result), SaveJob(record)]

    def _end_running(self, run: JobRun, now: float) -> None:
        run.checkpoints.cuts.give_up("the job ended before it was stored", now)
        self._effects.append(AppendMetrics(run.record.id, self._metrics(run, now)))
        self._seal(run.record, job_result(run, dict(self.counts - self._counted), now))
        self._run, self._last = None, run
        for session in self.sessions.of("worker"):
            session.pending.clear()

    def unused_id(self, name: str, is_taken: Callable[[str], bool]) -> str:
        """An id that no job ever had: the name, or name-2, name-3 ... `is_taken` says what else is in the way."""
        number = 1
        while True:
            candidate = name if number == 1 else f"{name}-{number}"
            if candidate not in self.jobs and not is_taken(candidate):
                return candidate
            number += 1

    def submit(
        self,
        job_id: str,
        specification: str,
        warnings: Sequence[str],
        submitted: str,
        now: float,
        resume: Mapping[str, Any] | None = None,
        key: str = "",
    ) -> list[Effect]:
        """Queue a checked job under an unused id.

        `resume`: see checkpoints/resume.py. `key`: what the submitter sends again where the answer is lost; a key that
        `submissions` has may not be submitted again. Empty for none.
        """
        record = JobRecord(job_id, self._next_number, specification, tuple(warnings), submitted)
        self._next_number += 1
        self.jobs[job_id] = record
        self._effects.append(SaveJob(record))
        if resume is not None:
            self._resumes[job_id] = resume
            self._effects.append(SaveDocument(job_id, "resume", resume))
        if key:
            self.submissions[key] = job_id
            self._effects.append(SaveDocument(job_id, "submission", {"key": key}))
        self._move_on(now)
        return self._take_effects()

    def cancel(self, job_id: str, now: float) -> list[Effect]:
        """End a job in any state. Raises UnknownJobError, EndedJobError."""
        record = self.jobs.get(job_id)
        if record is None:
            raise UnknownJobError(job_id)
        if record.state in FINAL_STATES:
            raise EndedJobError(f"job {job_id!r} is {record.state} already")
        if self._run is None or self._run.record.id != job_id:
            waiting = self._make_run(record, now)
            waiting.enter("cancelled", now, "cancelled in the queue")
            self._seal(waiting.record, job_result(waiting, {}, now))
        else:
            self._run.enter("cancelled", now, f"cancelled while {record.state}")
        self._move_on(now)
        return self._take_effects()

    def storage_failed(self, job_id: str, text: str, now: float) -> list[Effect]:
        """A job's file could not be written: the job fails, also where it was just called done."""
        record = self.jobs[job_id]
        if self._run is not None and self._run.record.id == job_id:
            self._run.fail(text, now)
            self._move_on(now)
        elif record.state != "failed":
            self.jobs[job_id] = replace(record, state="failed", reason=text)
            self.results[job_id] = {**self.results.get(job_id, {}), "state": "failed", "reason": text}
            self._effects += [SaveDocument(job_id, "result", self.results[job_id]), SaveJob(self.jobs[job_id])]
        return self._take_effects()

    # -------------------------------------------------------------------------------- status

    def _metrics(self, run: JobRun, now: float) -> dict[str, Any]:
        """One line of metrics.jsonl."""
        figures = job_figures(run, self._wait_reason(run), now)
        staleness = {name: figures["staleness"]["all"][name] for name in ("mean", "p50", "p95", "max")}
        return {**{name: figures[name] for name in METRICS}, "staleness": staleness}

    def _wait_reason(self, run: JobRun) -> str:
        return run.waits_for(*self._members())

    def job_summary(self, record: JobRecord) -> dict[str, Any]:
        run = self._run
        waiting = ""
        if run is not None and run.record.id == record.id:
            waiting = self._wait_reason(run)
        elif record.state == "queued":
            ahead = sum(job.number < record.number for job in self.queue()) + (run is not None)
            waiting = f"waiting for {ahead} job(s) ahead" if ahead else self._wait_for_cluster(record)
        return {
            "id": record.id,
            "state": record.state,
            "reason": record.reason,
            "waiting": waiting,
            "submitted": record.submitted,
            "warnings": list(record.warnings),
        }

    def job_detail(self, job_id: str) -> dict[str, Any]:
        """The summary with the specification and, when the job is over, its result. Raises UnknownJobError.

        A stored specification that is no JSON any more is shown as the text that it is.
        """
        record = self.jobs.get(job_id)
        if record is None:
            raise UnknownJobError(job_id)
        try:
            specification = json.loads(record.specification)
        except ValueError:
            specification = record.specification
        return {
            **self.job_summary(record),
            "specification": specification,
            "result": self.results.get(job_id),
        }

    def shortage(self, wanted: ClusterNeeds) -> str:
        """A warning where the cluster is smaller than a job needs it; empty where it is large enough."""
        shards, workers = self._members()
        if len(shards) >= wanted.shards and len(workers) >= wanted.workers:
            return ""
        return (
            f"cluster: found {len(shards)} shards and {len(workers)} workers, the job needs {wanted.shards} and "
            f"{wanted.workers}: it, and all jobs after it, wait until so many have joined; lower cluster.shards or "
            "cluster.workers, or start more"
        )

    def _wait_for_cluster(self, record: JobRecord) -> str:
        shards, workers = self._members()
        wanted = Job.model_validate_json(record.specification).cluster
        return (
            f"waiting for shards ({len(shards)} of {wanted.shards} are here) "
            f"and workers ({len(workers)} of {wanted.workers} are here)"
        )

    def snapshot(self, now: float) -> dict[str, Any]:
        """The status: plain JSON values, made anew each time and never changed afterwards."""
        run = self._run or self._last
        return {
            "uptime_seconds": now - self._started,
            "refusals": dict(sorted(self.counts.items())),
            "sessions": [session_figures(session, now) for session in self.sessions.all()],
            "queue": [self.job_summary(record) for record in self.queue()],
            "job": None if run is None else job_figures(run, self._wait_reason(run), now),
        }
