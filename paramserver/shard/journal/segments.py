"""The log over its files: records are appended, committed together, and read again after a restart.

A segment is named by the number of its first record. When it is full the next one begins; when a snapshot holds
what it holds, it goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from paramserver.encoding.base import Bytes
from paramserver.protocol.transport import Buffer
from paramserver.shard.journal.layout import (
    PREAMBLE_BYTES,
    Entry,
    JournalError,
    SegmentReader,
    encode_record,
    preamble,
)
from paramserver.shard.journal.records import AnyRecord
from paramserver.shard.journal.storage import File, Folder

SEGMENT_BYTES = 64 * 2**20  # a reader takes a whole one into memory
GATHER_BYTES = 32 * 2**10  # smaller records wait for the commit: one call for all of them
_PREFIX, _SUFFIX = "segment-", ".log"


def segment_name(first: int) -> str:
    return f"{_PREFIX}{first:016d}{_SUFFIX}"


def segment_numbers(folder: Folder) -> list[int]:
    """First numbers of the segments that are there, ascending."""
    names = [name for name in folder.names() if name.startswith(_PREFIX) and name.endswith(_SUFFIX)]
    try:
        return sorted(int(name[len(_PREFIX) : -len(_SUFFIX)]) for name in names)
    except ValueError:
        raise JournalError(
            f"{folder.path}: holds {names}, not all of which are segments; remove what is none"
        ) from None


class LogReader:
    """The records after number `after`. Iterate to the end, then open a `SegmentLog` where it ends.

    Raises JournalError for records that are missing or damaged, OSError for files that cannot be read.
    """

    def __init__(self, folder: Folder, after: int) -> None:
        self.folder = folder
        self.last = after  # number of the last record so far
        self.name: str | None = None  # of the segment to write on in; None: begin one
        self.first = 0  # number of that segment's first record
        self.size = 0  # bytes of that segment up to its last record
        self.read_bytes = 0
        self.leftovers: list[str] = []  # segments in which no record is: their maker died, or had no room
        self._after = after

    def __iter__(self) -> Iterator[Entry]:
        firsts = segment_numbers(self.folder)
        while firsts and next(iter(self._reader(firsts[-1])), None) is None:
            self.leftovers.append(segment_name(firsts.pop()))
        begin = max((place for place, first in enumerate(firsts) if first <= self._after + 1), default=0)
        for place, first in enumerate(firsts[begin:], begin):
            if first != self.last + 1 and (place > begin or first > self._after + 1):
                raise JournalError(
                    f"{self.folder.path}: {segment_name(first)} follows record {self.last}, so records are missing; "
                    "acknowledged updates are lost. Restore the files from a copy, or submit the job again"
                )
            yield from self._read(first, is_last=place == len(firsts) - 1)

    def _reader(self, first: int) -> SegmentReader:
        name = segment_name(first)
        return SegmentReader(f"{self.folder.path}/{name}", self.folder.read(name), first)

    def _read(self, first: int, is_last: bool) -> Iterator[Entry]:
        reader, last = self._reader(first), first - 1
        for entry in reader:
            last = entry.number
            if entry.number > self._after:
                self.last = last
                yield entry
        self.read_bytes += reader.end
        if reader.is_torn and not is_last:
            raise JournalError(
                f"{reader.name}: damaged at byte {reader.end}: record {last + 1} is not readable, but later segments "
                "are there; acknowledged updates are lost. Restore the file from a copy, or submit the job again"
            )
        # One that ends before the snapshot does cannot be gone on with: numbers have no gap in a segment.
        self.name, self.first, self.size = (
            (segment_name(first), first, reader.end) if last == self.last else (None, 0, 0)
        )


class SegmentLog:
    """Appends records after those that a reader found; cuts what is torn behind them.

    Args:
        reader: read to its end.
        must_sync: a commit makes records survive the death of the machine, not of the process alone.
    """

    def __init__(self, reader: LogReader, must_sync: bool) -> None:
        self._folder = reader.folder
        self._must_sync = must_sync
        self.number = self.durable = reader.last
        self.written_bytes = reader.read_bytes  # what a restart has to read, since the last snapshot
        self.trouble = ""  # why nothing can be written now
        self._pending: list[Buffer] = []
        self._pending_bytes = 0
        self._written = reader.last  # the last record that is in a file
        self._is_torn = False  # a write failed: there may be some of it behind `_size`
        self._file: File
        self._first = 0  # number of the first record in that file
        self._size = 0
        self._half_made: str | None = None
        self._is_lost = False  # what is durable is not known any more
        for name in reader.leftovers:
            self._folder.remove(name)
        if reader.name is None:
            self._begin()
        else:
            self._file, self._size, self._first = self._folder.append(reader.name), reader.size, reader.first
            self._file.truncate(self._size)
            self._file.sync()

    def append(self, record: AnyRecord, frames: Sequence[Bytes]) -> None:
        """Take a record; large frames go to the file at once, without a copy."""
        self._take(encode_record(self.number + 1, self.durable, record, frames), self.number + 1)

    def append_bytes(self, records: bytes | bytearray, last: int) -> None:
        """Take records as another log has written them: they follow ours, and the last one has this number."""
        self._take([records], last)

    def _take(self, buffers: list[Buffer], last: int) -> None:
        self.number = last
        size = sum(map(len, buffers))
        if size < GATHER_BYTES or self.trouble:
            # The frames are ours during this call only.
            self._pending.append(b"".join(buffers))
            self._pending_bytes += size
        else:
            self._write([*self._pending, *buffers], self._pending_bytes + size)
        if self._pending_bytes >= GATHER_BYTES and not self.trouble:
            self._write(self._pending, self._pending_bytes)

    @property
    def end(self) -> tuple[int, int, int]:
        """What is in files: the first number of the last segment, its bytes, the last record in it or before it."""
        return self._first, self._size, self._written

    @property
    def is_durable(self) -> bool:
        """Whether everything that was appended is as durable as the job asked for."""
        return self.durable == self.number

    def flush(self) -> None:
        """Write what was appended, so that another process may read it, before it is durable."""
        if self._written < self.number and not self.trouble:
            self._write(self._pending, self._pending_bytes)

    def commit(self) -> bool:
        """Make durable what was appended. False while the storage refuses: `trouble` says why; try again later.

        Raises JournalError where it is not known any more what is durable: the process must end.
        """
        if self._is_lost:
            raise JournalError(f"{self._folder.path}: a sync has failed before, and a second one would prove nothing")
        if self._written < self.number:
            self._write(self._pending, self._pending_bytes)
            if self.trouble:
                return False
        if self.durable < self.number:
            self._sync()
        if self._size >= SEGMENT_BYTES:
            self.roll()
        return True

    def _write(self, buffers: list[Buffer], size: int) -> None:
        try:
            if self._is_torn:
                self._file.truncate(self._size)
                self._is_torn = False
            self._file.write(buffers)
        except OSError as error:
            self._is_torn = True
            self.trouble = f"{self._folder.path}: cannot write: {error.strerror or error}"
            self._pending, self._pending_bytes = [bytes(buffer) for buffer in buffers], size
            return
        self.trouble = ""
        self._pending, self._pending_bytes = [], 0
        self._size += size
        self.written_bytes += size
        self._written = self.number
        if not self._must_sync:
            self.durable = self.number

    def _sync(self) -> None:
        try:
            self._file.sync()
        except OSError as error:
            self._is_lost = True
            # The system may have dropped what it could not write and would call the next sync a success.
            raise JournalError(
                f"{self._folder.path}: cannot make the journal durable: {error.strerror or error}; the shard ends "
                "here. Mend the disk and start it again: it goes on from what is readable"
            ) from None
        self.durable = self.number

    def roll(self) -> bool:
        """Begin a new segment; call when everything is durable. False where that is not possible now."""
        before, size = self._file, self._size
        try:
            self._begin()
        except OSError:
            self._file, self._size = before, size  # it is as good
            return False
        before.close()
        return True

    def _begin(self) -> None:
        if self._half_made is not None:
            self._folder.remove(self._half_made)
            self._half_made = None
        name = segment_name(self.number + 1)
        self._file = self._folder.create(name)
        self._half_made = name  # until it is whole: it must not lie between others that are
        self._file.write([preamble(self.number + 1)])
        if self._must_sync:
            self._file.sync()
            self._folder.sync()
        self._half_made = None
        self._first, self._size = self.number + 1, PREAMBLE_BYTES

    def remove_before(self, number: int) -> None:
        """Remove segments whose records are all before this one. Raises OSError."""
        firsts = segment_numbers(self._folder)
        for first, following in pairwise(firsts):
            if following <= number:
                self._folder.remove(segment_name(first))

    def close(self) -> None:
        self._file.close()
