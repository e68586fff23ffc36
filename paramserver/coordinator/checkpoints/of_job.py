"""What one job has to do with checkpoints: those that are taken of it, and the one that it goes on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from paramserver.coordinator.checkpoints.cut import Cuts
from paramserver.coordinator.checkpoints.manifest import FORMAT, Manifest
from paramserver.coordinator.checkpoints.resume import Resume
from paramserver.coordinator.effects import Effect, SendBlock, SendState
from paramserver.coordinator.sessions import Session
from paramserver.coordinator.telemetry import finite
from paramserver.job import Job
from paramserver.protocol.messages import CheckpointPiece, TakeBlock, TakeState, WorkerReport
from paramserver.protocol.transport import Peer

if TYPE_CHECKING:
    from paramserver.coordinator.lifecycle import JobRun


class JobCheckpoints:
    """Args:
    effects, count: shared with the core: facts to store; a peer's inconsistent message, by name.
    source: the document of a run that goes on from a checkpoint (checkpoints/resume.py), None for any other.
    progress: what an earlier coordinator's `progress` returned; empty for a new job.
    """

    def __init__(
        self,
        job_id: str,
        job: Job,
        effects: list[Effect],
        count: Callable[[str], None],
        source: Mapping[str, Any] | None,
        progress: Mapping[str, Any],
    ) -> None:
        self._job_id = job_id
        self._effects = effects
        self._count = count
        self.resume = None if source is None else Resume(source, progress.get("resume", {}))
        first = self.resume.source.number + 1 if self.resume else 1
        self.cuts = Cuts(job_id, job.checkpoint, effects, progress.get("cuts", {}), first)
        lost, squares = progress.get("residuals_lost", (0, 0.0))
        self._lost = int(lost), float(squares)  # residuals of workers that died: how many, and squares of their norms

    def progress(self) -> dict[str, Any]:
        """What a successor needs; the caller stores it."""
        taken = {} if self.resume is None else self.resume.taken
        return {"residuals_lost": self._lost, "cuts": self.cuts.progress(), "resume": taken}

    # ------------------------------------------------------------------------------- taking

    def advance(self, run: JobRun, workers: list[Session], now: float) -> None:
        """Move on with what is being taken; call whenever the job itself may move on."""
        parts = run.failover.parts
        if not parts:
            return
        placed = {part.name: (part.primary.shard, part.primary.incarnation) for part in parts}
        hindrance = "" if run.state == "training" else "training ended"
        if any(run.failover.is_away(part.name) for part in parts):
            hindrance = run.failover.waits_for() or "a shard died"
        make = self._maker(run)
        self.cuts.advance(workers, run.telemetry.parts, placed, run.steps(), hindrance, make, now)
        if self.cuts.has_changed:
            run.save_progress(now)

    @staticmethod
    def _maker(run: JobRun) -> Callable[[int], Manifest]:
        """Makes what a checkpoint says of the coordinator's own state."""

        def make(number: int) -> Manifest:
            assert run.layout is not None  # the parts are placed
            return Manifest(
                format=FORMAT,
                job=run.record.id,
                number=number,
                taken="",
                specification=run.record.specification,
                layout=run.layout,
                fingerprint=run.layout.fingerprint,
                examples=run.examples,
                leases=run.book.cut(),
                sums={split: dict(sums) for split, sums in run.leasing.sums.items()},
                metric_sums={split: dict(sums) for split, sums in run.leasing.metric_sums.items()},
                files=(),
            )

        return make

    # ----------------------------------------------------------------------------- messages

    def serve(
        self,
        run: JobRun,
        peer: Peer,
        session: Session,
        message: CheckpointPiece | TakeBlock | TakeState,
        data: memoryview | None,
        now: float,
    ) -> None:
        """A message of a live process of the right role about this job."""
        match message:
            case CheckpointPiece():
                assert data is not None  # its frame
                if not self.cuts.take(peer, message, data, now):
                    self._count("checkpoint-out-of-order")
            case TakeBlock():
                part = run.failover.part(message.part)
                is_its_own = part is not None and run.failover.role_of(session, part) == "primary"
                if self.resume is None or part is None or not is_its_own or message.block not in part.blocks:
                    self._count("unknown-block")
                    return
                self._effects.append(SendBlock(peer, self._job_id, part.name, message.block))
            case TakeState():
                resume = self.resume
                is_new = resume is not None and session.name not in resume.taken
                is_its_own = resume is not None and resume.give(session.name, session.incarnation)
                if is_its_own and is_new:
                    run.save_progress(now)
                worker = session.name if is_its_own else ""
                self._effects.append(SendState(peer, self._job_id, worker, message.offset))

    def offers(self, worker: Session) -> bool:
        """Whether a checkpoint keeps something for this worker."""
        return self.resume is not None and self.resume.offers(worker.name, worker.incarnation)

    # ------------------------------------------------------------------------------ figures

    def worker_lost(self, report: WorkerReport | None) -> None:
        """A worker died: so did its residuals, as far as it had told of them."""
        norm = 0.0 if report is None or report.drained else finite(report.residual_norm)
        if norm > 0:
            self._lost = self._lost[0] + 1, self._lost[1] + norm**2

    @property
    def steps_before(self) -> int:
        """Of the run that the checkpoint is of."""
        return self.resume.steps if self.resume else 0

    @property
    def examples_before(self) -> int:
        return self.resume.examples if self.resume else 0

    def residual_figures(self, state: str) -> dict[str, Any]:
        """The checkpoint that the run goes on from, and whose residuals are lost: of workers that died, and of those
        before the checkpoint that have no successor."""
        lost, squares = self._lost
        if self.resume is not None:
            unclaimed, more = self.resume.lost(is_over=state not in ("queued", "initialising", "training"))
            lost, squares = lost + unclaimed, squares + more
        return {
            "resumed_from": None if self.resume is None else self.resume.source.place,
            "residuals_lost": lost,  # workers
            "residuals_lost_norm": math.sqrt(squares),
        }
