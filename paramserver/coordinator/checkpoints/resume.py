"""A run that goes on from a checkpoint: what its coordinator begins with, and what became of the workers' residuals.

It is stored with the job as a document, so that a restarted coordinator goes on with it. No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from paramserver.coordinator.checkpoints.reading import Checkpoint
from paramserver.protocol.layout import Layout
from paramserver.router.leases import LeaseCut


class KeptOwn(Struct, frozen=True):
    """The squares of the norms of a worker's residuals: those that a successor adopts, and those that are dropped,
    because their block has taken another update of that name since."""

    adopted_squares: float
    dropped_squares: float


class ResumedFrom(Struct, frozen=True):
    """The document."""

    folder: str
    place: str  # RUN/N
    number: int
    layout: Layout
    examples: dict[str, int]
    leases: LeaseCut
    sums: dict[str, dict[str, float]]
    metric_sums: dict[str, dict[str, float]]
    workers: dict[str, KeptOwn]


def resumed_from(checkpoint: Checkpoint) -> ResumedFrom:
    manifest = checkpoint.manifest
    workers = {}
    for name, file in checkpoint.workers.items():
        adopted = {residual.block for residual in file.adopted}
        workers[name] = KeptOwn(
            sum(residual.norm**2 for residual in file.adopted),
            sum(residual.norm**2 for residual in file.kept.residuals if residual.block not in adopted),
        )
    return ResumedFrom(
        folder=str(checkpoint.folder.resolve()),
        place=checkpoint.place,
        number=manifest.number,
        layout=manifest.layout,
        examples=manifest.examples,
        leases=manifest.leases,
        sums=manifest.sums,
        metric_sums=manifest.metric_sums,
        workers=workers,
    )


def to_document(resumed: ResumedFrom) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(resumed)
    return document


class Resume:
    """Of one job. `taken` says which incarnation of a worker has its namesake's state; it is given to no other.

    Args:
        document: as `to_document` made it.
        taken: what an earlier coordinator had given away.
    """

    def __init__(self, document: Mapping[str, Any], taken: Mapping[str, int]) -> None:
        self.source = msgspec.convert(document, ResumedFrom)
        self.taken: dict[str, int] = dict(taken)

    @property
    def steps(self) -> int:
        """Of the leases that were done before."""
        return int(self.source.sums.get("train", {}).get("steps", 0))

    @property
    def examples(self) -> int:
        return int(self.source.sums.get("train", {}).get("examples", 0))

    def offers(self, worker: str, incarnation: int) -> bool:
        """Whether there is something for this worker that no other has."""
        return worker in self.source.workers and self.taken.get(worker, incarnation) == incarnation

    def give(self, worker: str, incarnation: int) -> bool:
        """Whether this worker may have it; then it is its own, and nobody else's."""
        if not self.offers(worker, incarnation):
            return False
        self.taken[worker] = incarnation
        return True

    def lost(self, is_over: bool) -> tuple[int, float]:
        """How many workers' residuals nobody adopted, in whole or in part, and the square of their norm.

        `is_over`: nobody will come for the others.
        """
        lost = [
            own.dropped_squares + (own.adopted_squares if is_over and name not in self.taken else 0.0)
            for name, own in self.source.workers.items()
        ]
        return sum(squares > 0 for squares in lost), sum(lost)
