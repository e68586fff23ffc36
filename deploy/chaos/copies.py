"""What the journal of a part of the model held, from all copies of it: the primary's, and those of its backups.

A record has the same number in every copy. A backup that is promoted goes on under a higher term; what its predecessor
alone had after that place was told to nobody and counts for nothing. A copy need not begin with the first record: a
backup begins with a snapshot. So one copy's records are valid where their term is the highest that had begun, and all
copies together must have every record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from paramserver.shard.journal.layout import Entry
from paramserver.shard.journal.records import Ordered, Pushed, TakenUp


class AuditError(Exception):
    """The journals cannot be followed, so nothing is proven. The text says where."""


class Stream(NamedTuple):
    """The updates of one worker's incarnation at one block: numbered from 1 without a gap."""

    worker: str
    incarnation: int
    block: int


Updates = tuple[tuple[Stream, int], ...]  # of one record, with their sequences


@dataclass
class Journal:
    """The updates of one part, in their order."""

    applied: dict[Stream, int] = field(default_factory=dict)  # sequence of the last update
    updates: Counter[int] = field(default_factory=Counter)  # by block
    out_of_order: list[str] = field(default_factory=list)  # updates that were no successor of the one before them

    def take(self, updates: Updates) -> None:
        for stream, sequence in updates:
            expected = self.applied.get(stream, 0) + 1
            if sequence != expected:
                self.out_of_order.append(f"{stream}: update {sequence} instead of {expected}")
            self.applied[stream] = max(sequence, expected - 1)
            self.updates[stream.block] += 1


@dataclass(frozen=True)
class Piece:
    """The records of one segment of one copy."""

    folder: Path
    first: int  # number of its first record
    updates: Sequence[Updates]  # one entry a record, empty for most kinds
    terms: Sequence[int]  # that each record begins or repeats; 0 where it says none

    @property
    def end(self) -> int:
        """One more than the number of its last record."""
        return self.first + len(self.updates)


def make_piece(folder: Path, first: int, entries: Iterable[Entry]) -> Piece:
    updates: list[Updates] = []
    terms: list[int] = []
    for entry in entries:
        match entry.record:
            case Pushed() as push:
                own = [(Stream(push.worker, push.incarnation, one.block), one.sequence) for one in push.updates]
                updates.append(tuple(own))
                terms.append(0)
            case Ordered(term=term):
                updates.append(())
                terms.append(term)
            case TakenUp() as taken:
                updates.append(())
                terms.append(taken.order.term)
            case _:
                updates.append(())
                terms.append(0)
    return Piece(folder, first, updates, terms)


def merge(part: str, pieces: Iterable[Piece]) -> tuple[Journal, Path]:
    """What a part's journal held, and the folder whose copy goes farthest under the last term.

    Raises AuditError where a record is in no copy, or copies of one term do not agree.
    """
    found: dict[int, dict[int, Updates]] = {}  # number -> term -> updates
    begins: dict[int, int] = {}  # term -> its first record
    ends: dict[tuple[int, Path], int] = {}  # (term, folder) -> its last record
    for piece, terms in _with_terms(pieces):
        for number, updates, term in zip(range(piece.first, piece.end), piece.updates, terms, strict=True):
            others = found.setdefault(number, {})
            if others.setdefault(term, updates) != updates:
                raise AuditError(f"{part}: copies of record {number} of term {term} do not agree")
            begins[term] = min(begins.get(term, number), number)
            ends[term, piece.folder] = max(ends.get((term, piece.folder), 0), number)
    if not begins:
        raise AuditError(f"{part}: no journal of it has a record")
    (_, last), folder = max(((term, end), folder) for (term, folder), end in ends.items())
    journal = Journal()
    in_force = 0
    for number in range(1, last + 1):
        in_force = max([in_force, *(term for term in found.get(number, {}) if begins[term] == number)])
        if in_force not in found.get(number, {}):
            raise AuditError(
                f"{part}: record {number} of term {in_force} is in no copy that was read: a segment was removed before "
                "it was looked at; look more often"
            )
        journal.take(found[number][in_force])
    return journal, folder


def _with_terms(pieces: Iterable[Piece]) -> list[tuple[Piece, list[int]]]:
    """Each record's term: that of the last order before it, in its own copy, or else the highest in any copy.

    Where that is wrong, for what lies before a piece was not read, the copies do not agree or a record is missing.
    """
    before: dict[tuple[Path, int], int] = {}  # (folder, end of a piece) -> term there
    highest: dict[int, int] = {}  # number -> highest term of any copy
    result = []
    for piece in sorted(pieces, key=lambda one: (one.first, str(one.folder))):
        known = before.get((piece.folder, piece.first))
        term = known or max((term for number, term in highest.items() if number < piece.first), default=0)
        terms = []
        for number, own in zip(range(piece.first, piece.end), piece.terms, strict=True):
            term = own or term
            terms.append(term)
            highest[number] = max(highest.get(number, 0), term)
        before[piece.folder, piece.end] = term
        result.append((piece, terms))
    return result
