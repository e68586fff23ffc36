"""A record as bytes, and how a reader tells a torn end from damage.

    segment: "PSJ1" | number of the first record u64 | crc32 of these u32 | record ...
    record:  "PSJr" | head bytes u32 | number u64 | durable u64 | frame bytes u32 | crc32 of head and frames u32
             | crc32 of these u32 | head (msgpack of `records.AnyRecord`) | frames

All numbers are little-endian. Records are numbered from 1 without a gap. `durable` is the last record that was as
durable as the job asks for when this one was written: a reader that meets bytes which are no record cuts them off
as a torn end only where no later record claims that they were durable. So a crash costs what was not acknowledged,
and a damaged disk is told with the place where it is damaged.

The checksum is CRC-32 as zlib has it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from paramserver.checksum import crc32
from paramserver.encoding.base import Bytes
from paramserver.protocol.transport import Buffer
from paramserver.shard.journal.records import AnyRecord

_PREAMBLE = struct.Struct("<4sQI")
_HEADER = struct.Struct("<4sIQQIII")
_SEGMENT_MAGIC, _RECORD_MAGIC = b"PSJ1", b"PSJr"
PREAMBLE_BYTES = _PREAMBLE.size
_DURABLE, _DURABLE_AT = struct.Struct("<Q"), 16  # where a header says it

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyRecord] = msgspec.msgpack.Decoder(AnyRecord)


class JournalError(Exception):
    """A journal that cannot be used. The text says which file, what was found, and what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A record as it was read. `frames` (bytes,) is a read-only view of what was read."""

    number: int
    record: AnyRecord
    frames: Bytes


def preamble(first: int) -> bytes:
    """The beginning of a segment whose first record has this number."""
    start = _PREAMBLE.pack(_SEGMENT_MAGIC, first, 0)[:-4]
    return start + crc32(start).to_bytes(4, "little")


def encode_record(number: int, durable: int, record: AnyRecord, frames: Sequence[Bytes]) -> list[Buffer]:
    """The buffers of a record: its head, and the frames themselves, not copied."""
    head = _encoder.encode(record)
    checksum, frame_bytes = crc32(head), 0
    for frame in frames:
        checksum = crc32(frame.data, checksum)
        frame_bytes += frame.size
    start = _HEADER.pack(_RECORD_MAGIC, len(head), number, durable, frame_bytes, checksum, 0)[:-4]
    return [b"".join((start, crc32(start).to_bytes(4, "little"), head)), *(frame.data for frame in frames)]


@dataclass(frozen=True, slots=True)
class _Header:
    number: int
    durable: int
    checksum: int
    head_at: int
    frames_at: int
    end: int


def _header(data: memoryview, at: int) -> _Header | None:
    """The header that begins here, or None where there is none."""
    if at + _HEADER.size > len(data):
        return None
    magic, head, number, durable, frames, checksum, own = _HEADER.unpack_from(data, at)
    if magic != _RECORD_MAGIC or own != crc32(data[at : at + _HEADER.size - 4]):
        return None
    body = at + _HEADER.size
    return _Header(number, durable, checksum, body, body + head, body + head + frames)


def _is_whole(data: memoryview, header: _Header) -> bool:
    return header.end <= len(data) and crc32(data[header.head_at : header.end]) == header.checksum


def count_whole(data: memoryview, most_bytes: int) -> tuple[int, int]:
    """(records, bytes) of the whole records that begin `data`, in at most so many bytes, but at least one record.

    (0, n) where not even the first one is whole: it has n bytes; 0 bytes where none begins there.
    """
    records = at = 0
    while (header := _header(data, at)) is not None and header.end <= len(data):
        if records and header.end > most_bytes:
            break
        records, at = records + 1, header.end
    if not records and header is not None:
        return 0, header.end
    return records, at


def skip_records(data: memoryview, at: int, records: int) -> int:
    """The place behind so many records, the first of which is at `at`. Raises JournalError where one is missing."""
    for _ in range(records):
        header = _header(data, at)
        if header is None:
            raise JournalError(f"no record begins at byte {at} of its segment, as one must")
        at = header.end
    return at


def adopt_records(data: bytearray, first: int, last: int, durable: int) -> None:
    """Check that these bytes are whole records with numbers from `first` to `last`, as another log has written them.

    Each then claims that `durable` was durable when it was written: here, not there. Raises ValueError.
    """
    view, at, number = memoryview(data), 0, first
    while at < len(data):
        header = _header(view, at)
        if header is None or header.number != number or not _is_whole(view, header):
            raise ValueError(f"the bytes at {at} are not record {number}")
        _DURABLE.pack_into(data, at + _DURABLE_AT, durable)
        checksum = crc32(view[at : at + _HEADER.size - 4])
        data[at + _HEADER.size - 4 : at + _HEADER.size] = checksum.to_bytes(4, "little")
        at, number = header.end, number + 1
    if number != last + 1:
        raise ValueError(f"the records end with {number - 1}, not with {last}")


def entries(data: bytearray) -> Iterator[Entry]:
    """The records that these bytes are, which have been checked. Raises JournalError for what cannot be read."""
    view, at = memoryview(data).toreadonly(), 0
    while at < len(data):
        header = _header(view, at)
        assert header is not None  # they were checked
        try:
            record = _decoder.decode(view[header.head_at : header.frames_at])
        except msgspec.DecodeError as error:
            raise JournalError(
                f"record {header.number} is whole but not readable by this release: {error}; run the release of the "
                "primary on all shards"
            ) from None
        yield Entry(header.number, record, np.frombuffer(view[header.frames_at : header.end], np.uint8))
        at = header.end


class SegmentReader:
    """The records of one segment.

    Args:
        name: of the file, for messages.
        data: all of its bytes.
        first: the number that its first record must have.

    Iterating gives its entries; then `end` is where the last whole record ends, and what lies behind it is torn.
    Raises JournalError for damage in the middle of what was durable.
    """

    @property
    def is_torn(self) -> bool:
        return self.end < len(self._data)

    def __init__(self, name: str, data: bytes | memoryview, first: int) -> None:
        self.name = name
        self.end = 0
        self._data = memoryview(data)
        self._first = first

    def __iter__(self) -> Iterator[Entry]:
        number, data = self._first, self._data
        if bytes(data[:PREAMBLE_BYTES]) != preamble(number):
            self._must_be_torn(0, number)
            return
        self.end = PREAMBLE_BYTES
        while self.end < len(data):
            header = _header(data, self.end)
            if header is None or header.number != number or not _is_whole(data, header):
                self._must_be_torn(self.end, number)
                return
            try:
                record = _decoder.decode(data[header.head_at : header.frames_at])
            except msgspec.DecodeError as error:
                raise JournalError(
                    f"{self.name}: record {number} at byte {self.end} is whole but not readable by this release: "
                    f"{error}; start the shard with the release that wrote it"
                ) from None
            yield Entry(number, record, np.frombuffer(data[header.frames_at : header.end], np.uint8))
            self.end = header.end
            number += 1

    def _must_be_torn(self, at: int, number: int) -> None:
        """Raise JournalError where a later record proves that the one at this place was durable once."""
        data, place = bytes(self._data[at:]), 0
        while (place := data.find(_RECORD_MAGIC, place)) >= 0:
            later = _header(self._data, at + place)
            if later is not None and later.durable >= number and _is_whole(self._data, later):
                raise JournalError(
                    f"{self.name}: damaged at byte {at}: record {number} is not readable, but record {later.number} "
                    f"at byte {at + place} says that it was written whole; acknowledged updates are lost. Restore the "
                    "file from a copy, or submit the job again"
                )
            place += 1
