"""A chaos run as a whole: a quiet run to compare with, then the same job under the schedule, then the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.chaos.harness import Run, Tell, Tormentor, chaos_cluster
from deploy.chaos.report import make_report
from deploy.chaos.schedule import Declaration, make_schedule
from deploy.local import Topology
from paramserver.job import Job, JobError, parse_job
from paramserver.process import StopRequest
from paramserver.status.access import make_token

PILOT_SECONDS, PILOT_SHARE = 10.0, 0.2  # at most, and of the time: in which the speed is measured that fills it
EPOCHS = 2**20  # more than any run has time for: the steps end it

# A real job that needs no download.
DEFAULT_JOB: dict[str, Any] = {
    "name": "chaos",
    "seed": 0,
    "model": {"family": "recurrent", "args": {"task": "char-lm", "cell": "lstm", "hidden": 200}},
    "data": {"name": "python-source", "batch": 16, "window": 64, "max_chars": 4_000_000},
    "push": {"encoding": "int4"},
    "pull": {"encoding": "ternary"},
    "optimizer": {"name": "adagrad", "lr": 0.07, "clip": 1.0},
    "durability": {"log": "journal", "backups": 1},
}


@dataclass(frozen=True)
class Campaign:
    """What is asked for.

    Args:
        job: as `resolve_job` returned it.
        quiet_seconds: of the run that it is compared with; 0 for none.
        directory: an empty folder for logs, journals and accounts.
        threads: compute threads a worker.
    """

    job: Job
    declaration: Declaration
    quiet_seconds: float
    directory: Path
    threads: int = 1

    def run(self, stop: StopRequest, tell: Tell) -> dict[str, Any]:
        """The report. Raises ChaosError, AuditError, EngineError, StoppedEarlyError."""
        wanted = self.declaration.seconds
        quiet: Run | None = None
        if self.quiet_seconds:
            tell(f"quiet run of {self.quiet_seconds:.0f} s")
            with chaos_cluster(self.directory / "quiet", self._topology("quiet"), stop) as cluster:
                tormentor = Tormentor(cluster, stop, tell)
                rate = self._pilot(tormentor, tell)
                quiet = tormentor.run(self._job_of(rate * self.quiet_seconds), (), self.quiet_seconds)
            tell(f"quiet: {quiet.throughput.a_second:,.1f} updates/s, {quiet.result['steps']:,} steps")
        schedule = make_schedule(self.declaration)
        tell(f"chaos run of {wanted:.0f} s, seed {self.declaration.seed}, {len(schedule)} faults")
        with chaos_cluster(self.directory / "chaos", self._topology("chaos"), stop) as cluster:
            tormentor = Tormentor(cluster, stop, tell)
            if quiet is None:
                rate = self._pilot(tormentor, tell)
            chaos = tormentor.run(self._job_of(rate * wanted), schedule, wanted)
        return make_report(self.declaration, chaos, quiet, self._why_no_loss())

    def _pilot(self, tormentor: Tormentor, tell: Tell) -> float:
        """Steps a second of the whole cluster."""
        seconds = min(PILOT_SECONDS, PILOT_SHARE * self.declaration.seconds)
        rate = tormentor.steps_a_second(self._job_of(None), seconds)
        tell(f"the cluster makes {rate:.1f} steps/s")
        return rate

    def _job_of(self, steps: float | None) -> Job:
        body = self.job.model_dump(mode="json")
        body["stop"] = {"epochs": EPOCHS} if steps is None else {"epochs": EPOCHS, "steps": max(1, round(steps))}
        return parse_job(body, "the chaos job")

    def _topology(self, name: str) -> Topology:
        folder = self.directory / name
        folder.mkdir(parents=True, exist_ok=True)
        token_file = folder / "token"
        make_token(token_file)
        return Topology(
            shards=self.declaration.shards,
            workers=self.declaration.workers,
            runs=folder / "runs",
            data_roots=(Path("/"),),  # it reads whatever its user can, and lets nobody else ask
            threads=self.threads,
            token_file=token_file,
            token_for_reading=True,
        )

    def _why_no_loss(self) -> str:
        if not self.quiet_seconds:
            return "there was no quiet run"
        if self.quiet_seconds != self.declaration.seconds:
            return "the quiet run made another number of steps"
        return ""


def resolve_job(body: dict[str, Any], shards: int, workers: int) -> tuple[Job, list[str]]:
    """The job that is run, and what was changed for it. Raises JobError for one that chaos can prove nothing of."""
    job = parse_job({**body, "cluster": {"shards": shards, "workers": workers}}, "the chaos job")
    changed = []
    if job.consistency.mode == "sync":
        raise JobError(
            "consistency.mode: found 'sync', chaos needs 'async' or 'bounded': it counts updates by the versions of "
            "blocks, and a round of sync raises a version once for several updates"
        )
    if job.durability.log == "none":
        changed.append("durability.log is 'journal' here: with 'none' the first shard that dies ends the job")
        body = {**job.model_dump(mode="json"), "durability": {**job.durability.model_dump(), "log": "journal"}}
        job = parse_job(body, "the chaos job")
    return job, changed
