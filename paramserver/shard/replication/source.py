"""The bytes of a line, as they lie in the primary's files: nothing is encoded twice, and nothing piles up in memory for
a backup that is slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from paramserver.encoding.base import Bytes
from paramserver.shard.journal.keeper import ShardJournal
from paramserver.shard.journal.layout import PREAMBLE_BYTES, JournalError, count_whole, skip_records
from paramserver.shard.journal.segments import segment_name, segment_numbers
from paramserver.shard.journal.snapshot import newest_number, snapshot_names

CHUNK_BYTES = 2**20  # of records in one chunk, but for a record that is larger

Kind = Literal["records", "manifest", "arrays"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of bytes of one file. `begin` is its place in the line; `record` the last one that it brings."""

    kind: Kind
    begin: int
    size: int
    record: int
    name: str
    at: int

    @property
    def end(self) -> int:
        return self.begin + self.size


class LineSource:
    """A line from its beginning on. While it is open the journal keeps the files that it needs.

    Args:
        journal: no snapshot of it is on its way.
    """

    def __init__(self, journal: ShardJournal) -> None:
        self._journal = journal
        self._folder = journal.folder
        self._end = 0  # of the line so far
        self._waiting: list[Chunk] = []
        snapshot = newest_number(self._folder)
        self._last = snapshot or 0  # the last record of the line so far
        self._segment, self._at = self._find(self._last)  # first number of the segment that is read, and where
        self._records_bytes = 0  # of records in the line
        later = [first for first in segment_numbers(self._folder) if first > self._segment]
        there = self._folder.size(segment_name(self._segment)) - self._at
        there += sum(self._folder.size(segment_name(first)) - PREAMBLE_BYTES for first in later)
        self._origin = journal.written_bytes - there
        if snapshot is not None:
            journal.is_snapshot_read = True
            manifest, arrays = snapshot_names(snapshot)
            self._waiting.append(self._chunk("manifest", self._folder.size(manifest), snapshot, manifest, 0))
            self._waiting.append(self._chunk("arrays", self._folder.size(arrays), snapshot, arrays, 0))
        journal.needed = self._last + 1

    def _find(self, record: int) -> tuple[int, int]:
        """Where the records after this one begin. A snapshot begins a segment, but its process may have died then."""
        firsts = [first for first in segment_numbers(self._folder) if first <= record + 1]
        if not firsts:
            raise JournalError(f"{self._folder.path}: record {record + 1} is in no segment")
        first = max(firsts)
        data = memoryview(self._folder.read(segment_name(first))) if first <= record else memoryview(b"")
        return first, skip_records(data, PREAMBLE_BYTES, record + 1 - first)

    def _chunk(self, kind: Kind, size: int, record: int, name: str, at: int) -> Chunk:
        begin, self._end = self._end, self._end + size
        return Chunk(kind, begin, size, record, name, at)

    @property
    def is_of_records(self) -> bool:
        """Whether records follow now: the snapshot, if there is one, is in the line already."""
        return not self._waiting

    @property
    def lag_bytes(self) -> int:
        """Of records that are in files and not yet in the line."""
        return self._journal.written_bytes - self._origin - self._records_bytes

    def next(self) -> Chunk | None:
        """What follows in the line; None where nothing more is written yet. Raises OSError."""
        if self._waiting:
            return self._waiting.pop(0)
        first, size, written = self._journal.end
        if self._last == written:
            return None
        if self._segment != first and self._last + 1 in segment_numbers(self._folder):
            self._segment, self._at = self._last + 1, PREAMBLE_BYTES  # the one before may be gone already
        name = segment_name(self._segment)
        if self._segment != first:
            size = self._folder.size(name)
        elif size - self._at <= CHUNK_BYTES:
            return self._records(name, written - self._last, size - self._at)
        records, taken = self._count(name, min(size - self._at, CHUNK_BYTES))
        if not records:
            records, taken = self._count(name, min(size - self._at, taken))
        if not records:
            raise JournalError(f"{self._folder.path}/{name}: record {self._last + 1} is not at byte {self._at}")
        return self._records(name, records, taken)

    def _count(self, name: str, size: int) -> tuple[int, int]:
        found = np.empty(size, np.uint8)
        self._folder.read_into(name, self._at, found)
        return count_whole(found.data, CHUNK_BYTES)

    def _records(self, name: str, records: int, size: int) -> Chunk:
        self._last += records
        chunk = self._chunk("records", size, self._last, name, self._at)
        self._at += size
        self._records_bytes += size
        return chunk

    def read(self, chunk: Chunk, offset: int, buffer: Bytes) -> None:
        """Fill the buffer with a chunk's bytes from `offset` on. Raises OSError."""
        self._folder.read_into(chunk.name, chunk.at + offset, buffer)

    def passed(self, chunk: Chunk) -> None:
        """The backup has this chunk and all before it: its bytes are not asked for again."""
        if chunk.kind != "manifest":
            self._journal.is_snapshot_read = False
            self._journal.needed = chunk.record + 1

    def close(self) -> None:
        """The journal may remove what it likes."""
        self._journal.is_snapshot_read = False
        self._journal.needed = None
