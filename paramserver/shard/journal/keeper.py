"""The journal of one job on one shard: opened or recovered, written, and bounded by snapshots."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from threading import Thread
from time import monotonic

import llvmlite.binding
from msgspec import structs

from paramserver.encoding.base import Bytes
from paramserver.job import Job
from paramserver.process import log
from paramserver.protocol.messages import PartOrder
from paramserver.shard.journal.layout import JournalError
from paramserver.shard.journal.records import AnyRecord, TakenUp
from paramserver.shard.journal.replay import kept, replay, restored
from paramserver.shard.journal.segments import LogReader, SegmentLog
from paramserver.shard.journal.snapshot import SnapshotWriter, clean, load_newest
from paramserver.shard.journal.states import Arrays
from paramserver.shard.journal.storage import Folder
from paramserver.shard.serving import Serving

SNAPSHOT_RATIO = 8  # log bytes over those of a snapshot, when the next one is taken: it costs an eighth more writing
SNAPSHOT_BYTES = 64 * 2**20  # and at least so many
LONG_SHARE = (
    8  # of the bytes at which a snapshot is due: with more of them one is taken before another shard copies all
)
MOST_LAG = 2  # times the bytes at which a snapshot is due
UNFINISHED = "unfinished"  # a file that is there until a backup has a whole state
AGAIN_SECONDS = 10.0  # after a snapshot that could not be taken


@cache
def this_build() -> str:
    """What computes here: optimiser steps are bit-identical within one build and class of CPU."""
    parts = [f"{name} {version(name)}" for name in ("paramserver", "numpy", "numba", "llvmlite")]
    return ", ".join([*parts, f"python {platform.python_version()}", str(llvmlite.binding.get_host_cpu_name())])


class ShardJournal:
    """What the core writes to and the loop commits. Used by the shard's one thread.

    Args:
        log: open.
        in_background: snapshots are made durable in a thread of their own; a test may want them at once.
    """

    def __init__(self, folder: Folder, log: SegmentLog, serving: Serving, in_background: bool = True) -> None:
        self._folder = folder
        self._log = log
        self._in_background = in_background
        self._keeps_all = serving.job.durability.keep == "all"
        self._snapshots = SnapshotWriter(folder)
        self._sealing: Thread | None = None
        self._sealed: int | None = None  # the number of a snapshot that is durable and whose segments can go
        self._failure: BaseException | None = None
        self._since = 0  # `written_bytes` at the last snapshot
        self._due_bytes = _due_bytes(kept(serving)[1])
        self._again_at = 0.0
        self.snapshots = 0
        self.needed: int | None = None
        """Somebody reads the segments from this record on: they stay."""
        self.is_snapshot_read = False
        """Somebody reads the newest snapshot: it stays, and no other one is taken."""

    def append(self, record: AnyRecord, frames: Sequence[Bytes] = ()) -> None:
        self._log.append(record, frames)

    def append_bytes(self, records: bytes | bytearray, last: int) -> None:
        """See `SegmentLog.append_bytes`."""
        self._log.append_bytes(records, last)

    def flush(self) -> None:
        """See `SegmentLog.flush`."""
        self._log.flush()

    def commit(self) -> bool:
        """See `SegmentLog.commit`."""
        return self._log.commit()

    @property
    def folder(self) -> Folder:
        """Where the files are: to be read only."""
        return self._folder

    @property
    def end(self) -> tuple[int, int, int]:
        """See `SegmentLog.end`."""
        return self._log.end

    @property
    def durable(self) -> int:
        """The last record that is as durable as the job asked for."""
        return self._log.durable

    @property
    def is_sealing(self) -> bool:
        """Whether a snapshot is on its way to the disk."""
        return self._sealing is not None

    @property
    def is_long(self) -> bool:
        """Whether what was written since the last snapshot is more than another one would be."""
        return self._log.written_bytes - self._since > self._due_bytes // LONG_SHARE

    @property
    def is_durable(self) -> bool:
        return self._log.is_durable

    @property
    def number(self) -> int:
        """Of the last record."""
        return self._log.number

    @property
    def written_bytes(self) -> int:
        """To the log, since it was opened, and what was read then."""
        return self._log.written_bytes

    @property
    def trouble(self) -> str:
        """Why nothing can be written now; empty where all is well."""
        return self._log.trouble

    def snapshot_if_due(self, serving: Serving) -> None:
        """Bound the log. Call when everything is committed. Raises what ended the thread, but for a refusing disk."""
        self._look_after_sealing()
        if self.is_due and self.may_snapshot:
            self.snapshot(serving)

    @property
    def most_lag_bytes(self) -> int:
        """How far a backup may stay behind while the files are kept for it."""
        return MOST_LAG * self._due_bytes

    @property
    def may_snapshot(self) -> bool:
        """Whether a snapshot may be taken now: none is on its way, none is read, the last one did not just fail."""
        return self._sealing is None and not self.is_snapshot_read and monotonic() >= self._again_at

    @property
    def is_due(self) -> bool:
        """Whether the log is so long that a snapshot must bound it."""
        return self._log.written_bytes - self._since >= self._due_bytes

    def snapshot(self, serving: Serving) -> None:
        """Write a snapshot of the present state, all of which is committed; it is made durable meanwhile."""
        state, arrays = kept(serving)
        if not self._log.roll():
            self._put_off("no room for another segment")
            return
        number = self._log.number
        try:
            written = self._snapshots.write(number, this_build(), state, arrays)
        except OSError as error:
            self._put_off(error.strerror or str(error))
            return
        self._since, self._due_bytes = self._log.written_bytes, _due_bytes(arrays)

        def seal() -> None:
            try:
                self._snapshots.seal(written)
                self._sealed = number
            except BaseException as failure:
                self._failure = failure

        if self._in_background:
            self._sealing = Thread(target=seal, name="snapshot")
            self._sealing.start()
        else:
            seal()
            self._look_after_sealing()

    def _look_after_sealing(self) -> None:
        if self._sealing is not None:
            if self._sealing.is_alive():
                return
            self._sealing = None
        failure, self._failure = self._failure, None
        if isinstance(failure, OSError):
            self._put_off(failure.strerror or str(failure))
        elif failure is not None:
            raise failure
        number, self._sealed = self._sealed, None
        if number is not None:
            self.snapshots += 1
            if self._keeps_all:
                return
            try:
                self._log.remove_before(number + 1 if self.needed is None else min(number + 1, self.needed))
            except OSError as error:
                log("segments-kept", level="warning", folder=self._folder.path, reason=error)

    def _put_off(self, reason: str) -> None:
        """Older files are still there: nothing is lost but room."""
        log("snapshot-put-off", level="warning", folder=self._folder.path, reason=reason)
        self._again_at = monotonic() + AGAIN_SECONDS
        try:
            clean(self._folder)
        except OSError as error:
            log("snapshot-left", level="warning", folder=self._folder.path, reason=error)

    def close(self) -> None:
        """Let go of the files and their folder. What is not committed is forgotten."""
        self.release()
        self._folder.close()

    def release(self) -> None:
        """Let go of the files, not of their folder."""
        if self._sealing is not None:
            self._sealing.join()
        self._log.close()


def open_journal(folder: Folder, order: PartOrder, in_background: bool = True) -> tuple[Serving, ShardJournal]:
    """The state that a folder holds of the order's job, or a fresh one where it is empty, with its journal.

    Bit-identical to what was committed before the last process ended, or to something after it that was not
    acknowledged. The order itself is not followed: the core does that. Raises JournalError for what cannot be gone
    on with, OSError for a folder that cannot be used.
    """
    if UNFINISHED in folder.names():
        raise JournalError(
            f"{folder.path}: is the unfinished copy of another shard's journal; start the shard that has the whole one"
        )
    job = Job.model_validate_json(order.specification)
    clean(folder)
    snapshot = load_newest(folder)
    serving, number, build = None, 0, this_build()
    if snapshot is not None:
        manifest, arrays = snapshot
        must_fit(folder, manifest.state.order, order)
        serving, number, build = restored(manifest.state, arrays), manifest.number, manifest.build
    reader = LogReader(folder, number)
    for entry in reader:
        if serving is None:
            if not isinstance(entry.record, TakenUp):
                raise JournalError(f"{folder.path}: record {entry.number} is no beginning, and there is no snapshot")
            must_fit(folder, entry.record.order, order)
            serving, build = Serving(entry.record.order), entry.record.build
            continue
        if build != this_build():
            raise JournalError(
                f"{folder.path}: was written by [{build}], here is [{this_build()}]: replayed, its updates might give "
                "other bits; start the shard on a machine and with packages like the first"
            )
        replay(serving, entry)
    segments = SegmentLog(reader, must_sync=job.durability.log == "journal+fsync")
    if serving is None:
        # Members come by the core, which follows the whole order and writes that down.
        first = structs.replace(order, members=())
        serving = Serving(first)
        segments.append(TakenUp(first, build), ())
    else:
        log("journal-replayed", folder=folder.path, snapshot=number, records=reader.last - number)
    journal = serving.journal = ShardJournal(folder, segments, serving, in_background)
    return serving, journal


def must_fit(folder: Folder, written: PartOrder, order: PartOrder) -> None:
    """Raise JournalError where what was written is of another job, or under a newer term, than the order's."""
    for what, found, wanted in (
        ("job", written.job, order.job),
        ("specification", written.specification, order.specification),
        ("layout", written.layout.fingerprint, order.layout.fingerprint),
    ):
        if found != wanted:
            raise JournalError(
                f"{folder.path}: is the journal of another {what} ({found}), the order's is {wanted}; "
                "move the folder away, or submit the job again"
            )
    if written.term > order.term:
        raise JournalError(
            f"{folder.path}: was written under term {written.term}, the order has the older term {order.term}"
        )


def _due_bytes(arrays: Arrays) -> int:
    """How many bytes the log may have before the next snapshot of such arrays."""
    return max(SNAPSHOT_BYTES, SNAPSHOT_RATIO * sum(array.nbytes for array in arrays.values()))
