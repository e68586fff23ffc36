"""What a worker's file in a checkpoint says of itself, in its metadata under "worker": the worker writes it, the
coordinator judges by it which residuals a successor may add to its next update."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

Mark = tuple[int, int]  # (incarnation, sequence) of a worker's last update of a block


class KeptResidual(Struct, frozen=True, array_like=True):
    """`sequence` is that of the worker's last update of the block, 0 where it never pushed one."""

    block: int
    sequence: int
    norm: float


class KeptWorker(Struct, frozen=True):
    worker: str
    incarnation: int
    residuals: tuple[KeptResidual, ...]


def is_current(mark: Mark | None, incarnation: int, sequence: int) -> bool:
    """Whether a residual saved after this update still is what the block lacks: no later update of that worker, or of
    a successor, has been applied."""
    if mark is None or mark[0] < incarnation:
        return sequence == 0
    return mark == (incarnation, sequence)


def adopted(worker: KeptWorker, marks: Mapping[int, Mapping[str, Mark]]) -> tuple[KeptResidual, ...]:
    """The residuals that a successor takes over. `marks`: block -> worker -> mark."""
    return tuple(
        residual
        for residual in worker.residuals
        if residual.block in marks
        and is_current(marks[residual.block].get(worker.worker), worker.incarnation, residual.sequence)
    )
