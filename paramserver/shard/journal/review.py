"""A journal read again after the fact: the same steps as a restart's, watched one update at a time.

Nothing is written: a journal may be reviewed where it lies, once no shard holds it any more.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from paramserver.encoding import Encoding
from paramserver.encoding.base import Bytes
from paramserver.protocol.messages import PartOrder
from paramserver.shard.block import HeldBlock
from paramserver.shard.journal.keeper import this_build
from paramserver.shard.journal.layout import Entry, JournalError
from paramserver.shard.journal.records import Ordered, TakenUp
from paramserver.shard.journal.replay import replay, restored
from paramserver.shard.journal.segments import LogReader, segment_numbers
from paramserver.shard.journal.snapshot import load_newest
from paramserver.shard.journal.storage import File, OsFiles
from paramserver.shard.serving import Serving


@dataclass(frozen=True)
class Move:
    """What one step of a block's optimiser did. With `sync` it is the step that the named update completed."""

    record: int  # its number in the journal
    block: int
    parameter: str
    worker: str
    incarnation: int
    sequence: int
    staleness: int  # versions
    lr_factor: float
    version: int  # of the block afterwards
    distance: float  # |change of the weights|, Euclidean
    relative: float  # over |the weights before|; 0 where these are 0


class ReadOnlyFolder(OsFiles):
    """A journal's folder, held against shards while it is read. Raises OSError; BlockingIOError where one holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BaseException:
            os.close(self._descriptor)
            raise

    def create(self, name: str) -> File:
        self._refuse(name)

    def append(self, name: str) -> File:
        self._refuse(name)

    def rename(self, old: str, new: str) -> None:
        self._refuse(old)

    def remove(self, name: str) -> None:
        self._refuse(name)

    def sync(self) -> None:
        """Nothing was changed."""

    def close(self) -> None:
        os.close(self._descriptor)

    def _refuse(self, name: str) -> NoReturn:
        raise OSError(errno.EROFS, "a journal under review is not changed", name)


class WatchedServing(Serving):
    """A part's state that tells what each update did to its block."""

    def __init__(self, order: PartOrder) -> None:
        super().__init__(order)
        self.watch: Callable[[Move], None] | None = None
        self.record = 0  # the one that is replayed
        self._update = ("", 0, 0, 0)  # worker, incarnation, sequence, staleness

    def absorb(
        self,
        block: HeldBlock,
        worker: str,
        incarnation: int,
        sequence: int,
        encoding: Encoding,
        frame: Bytes,
        staleness: int,
        is_pull_slow: bool,
        is_last: bool = False,
    ) -> None:
        self._update = worker, incarnation, sequence, staleness
        super().absorb(block, worker, incarnation, sequence, encoding, frame, staleness, is_pull_slow, is_last)

    def _apply(self, block: HeldBlock, encoding: Encoding, frame: Bytes, staleness: int) -> None:
        if self.watch is None:
            super()._apply(block, encoding, frame, staleness)
            return
        assert self.given, "a replay gives what was decided"
        lr_factor = self.given[0].lr_factor
        before = block.weights.copy()
        super()._apply(block, encoding, frame, staleness)
        worker, incarnation, sequence, _ = self._update
        size = float(np.linalg.norm(before))
        distance = float(np.linalg.norm(np.subtract(block.weights, before, out=before)))
        parameter = self.order.layout.blocks[block.index].parameter
        self.watch(
            Move(
                record=self.record,
                block=block.index,
                parameter=parameter,
                worker=worker,
                incarnation=incarnation,
                sequence=sequence,
                staleness=staleness,
                lr_factor=lr_factor,
                version=block.version,
                distance=distance,
                relative=distance / size if size else 0.0,
            )
        )


@dataclass(frozen=True)
class Review:
    """A part's state where the review ended."""

    serving: Serving
    first: int  # number of the first record that was replayed; the snapshot before it holds the others
    last: int
    build: str  # what computed the updates
    is_this_build: bool
    """Else weights may differ from those of the run in their last bits."""


def review(path: Path, watch: Callable[[Move], None] | None = None, until: int | None = None) -> Review:
    """Replay a part's journal.

    Args:
        path: its folder.
        watch: called after every step of a block's optimiser.
        until: number of the last record to replay; the last one of the journal where it is not given. Records that a
            snapshot has taken the place of cannot be stopped at.

    Raises JournalError for what cannot be read, OSError.
    """
    folder = ReadOnlyFolder(path)
    try:
        return _review(folder, watch, until)
    finally:
        folder.close()


def _review(folder: ReadOnlyFolder, watch: Callable[[Move], None] | None, until: int | None) -> Review:
    serving: WatchedServing | None = None
    number, build = 0, this_build()
    firsts = segment_numbers(folder)
    if not firsts or firsts[0] != 1:  # the beginning has gone: from the snapshot on
        snapshot = load_newest(folder)
        if snapshot is None:
            raise JournalError(f"{folder.path}: holds neither the first record nor a snapshot: it is no journal")
        manifest, arrays = snapshot
        number, build = manifest.number, manifest.build
        made = restored(manifest.state, arrays, WatchedServing)
        assert isinstance(made, WatchedServing)
        serving = made
    if until is not None and until < number:
        raise JournalError(
            f"{folder.path}: record {until} is older than the snapshot, which holds all up to {number}; "
            "stop at that one or later, or run the job with durability.keep 'all'"
        )
    first, last = number + 1, number
    for entry in LogReader(folder, number):
        if until is not None and entry.number > until:
            break
        last = entry.number
        if serving is None:
            serving, build = _begin(folder, entry)
            continue
        serving.record, serving.watch = entry.number, watch
        replay(serving, entry)
    if serving is None:
        raise JournalError(f"{folder.path}: holds no whole record")
    if until is not None and last < until:
        raise JournalError(f"{folder.path}: its last record is {last}, not {until}")
    return Review(serving, first, last, build, build == this_build())


def _begin(folder: ReadOnlyFolder, entry: Entry) -> tuple[WatchedServing, str]:
    if not isinstance(entry.record, TakenUp):
        raise JournalError(f"{folder.path}: record {entry.number} is no beginning")
    return WatchedServing(entry.record.order), entry.record.build


def first_of(path: Path) -> int:
    """The first record that a journal still has, in whatever segments are there. Raises as above."""
    folder = ReadOnlyFolder(path)
    try:
        return min(segment_numbers(folder), default=0)
    finally:
        folder.close()


def last_of(path: Path) -> tuple[int, int]:
    """The last term and record of a journal: of two of the same part the greater one is the part's. Raises as above."""
    folder = ReadOnlyFolder(path)
    try:
        snapshot = load_newest(folder)
        term, number = (snapshot[0].state.order.term, snapshot[0].number) if snapshot else (0, 0)
        for entry in LogReader(folder, number):
            number = entry.number
            match entry.record:
                case Ordered(term=newer):
                    term = newer
                case TakenUp(order=order):
                    term = order.term
        return term, number
    finally:
        folder.close()
