"""Watermarks: the last applied (incarnation, sequence) of each worker at one block. They make a push at most once.

They travel with the block, so that whoever holds the block next refuses the same duplicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Verdict(Enum):
    """What a sequence is, against the watermark."""

    NEXT = "next"
    DUPLICATE = "duplicate"
    GAP = "gap"
    OLD = "old incarnation"


class Watermarks:
    """One block's watermarks. A new incarnation of a worker starts its sequence at 1 again."""

    __slots__ = ("_marks",)

    def __init__(self, marks: Mapping[str, tuple[int, int]] | None = None) -> None:
        self._marks: dict[str, tuple[int, int]] = dict(marks or {})

    @property
    def workers(self) -> int:
        """How many workers have pushed the block."""
        return len(self._marks)

    def expected(self, worker: str, incarnation: int) -> int:
        """The next sequence that this incarnation may push."""
        mark = self._marks.get(worker)
        return mark[1] + 1 if mark is not None and mark[0] == incarnation else 1

    def judge(self, worker: str, incarnation: int, sequence: int) -> Verdict:
        mark = self._marks.get(worker)
        if mark is not None and incarnation < mark[0]:
            return Verdict.OLD
        last = mark[1] if mark is not None and mark[0] == incarnation else 0
        if sequence <= last:
            return Verdict.DUPLICATE
        return Verdict.NEXT if sequence == last + 1 else Verdict.GAP

    def advance(self, worker: str, incarnation: int, sequence: int) -> None:
        """Record an update that was judged NEXT and is now part of the state."""
        self._marks[worker] = (incarnation, sequence)

    def as_dict(self) -> dict[str, tuple[int, int]]:
        """A copy: worker -> (incarnation, sequence)."""
        return dict(self._marks)
