"""How much of the learning rate an update gets, by how stale it is and how young its block is.

An optimizer that divides by past gradients takes its first steps at full length, however small the gradients: Adagrad
with nothing accumulated moves every element by the learning rate. One process corrects itself with its second step.
Of N workers, N such steps were computed on the same weights and add up, and each of their next rounds is as blind; a
model may end those rounds worse than it began, and how much worse is chance. So a stale update of a young block gets a
share of the learning rate: an update that s others overtook gets all of it from the block's `settling_updates` x s-th
version on, which is the same number of its own updates for any number of workers. It is twice as many where the
optimizer runs on the workers, for there each one's sums grow by its own gradients alone. An update that is not stale
gets all of it at once: one worker alone trains as one process does.

At the end of a job the workers' residuals come, whole. They are what rounding left behind over many steps, while the
weights went on without it, and no later step corrects what they do: taken as they are, they cost sign and adaptive
pushes 0.4 to 5% of the loss. So each counts as an update that `RESIDUAL_ROUNDS` rounds of all workers overtook, at
1 / (1 + staleness). A worker that leaves earlier flushes at the full rate: the others train on.

Every factor is written to the journal beside its update.
"""

from __future__ import annotations

from collections.abc import Callable

from paramserver.job import Job

OWN_SUMS = 2  # times settling_updates where every worker accumulates for itself
RESIDUAL_ROUNDS = 8  # how old a residual counts as at the end, in updates of each worker
# lr factor by staleness in versions (staleness-aware SGD: Zhang et al., IJCAI 2016, eq. 5; its root is milder).
BY_STALENESS: dict[str, Callable[[int], float]] = {
    "none": lambda staleness: 1.0,
    "inverse": lambda staleness: 1.0 / (1.0 + staleness),
    "sqrt": lambda staleness: float((1.0 + staleness) ** -0.5),
}


class Damping:
    """The learning rate's factor of each update of one job. It holds settings only."""

    def __init__(self, job: Job) -> None:
        self._by_staleness = BY_STALENESS[job.consistency.damping]
        # What divides by nothing takes short steps for small gradients.
        rounds = OWN_SUMS if job.optimizer.where == "worker" else 1
        self._settling_updates = rounds * job.consistency.settling_updates if job.optimizer.is_preconditioning else 0

    def factor(self, staleness: int, version: int) -> float:
        """Of an update that so many versions overtook, of a block that had `version` updates before it: 0 to 1."""
        settling = self._settling_updates * staleness
        share = min(1.0, (version + 1) / settling) if settling else 1.0
        return self._by_staleness(staleness) * share

    @staticmethod
    def last_factor(workers: int) -> float:
        """Of a residual at the end of a job, of a block that so many workers have pushed."""
        return BY_STALENESS["inverse"](RESIDUAL_ROUNDS * workers)
