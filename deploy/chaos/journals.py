"""Every update that the journals of a cluster ever held, read while the shards drop what their snapshots make needless.

A shard removes a segment of its log when a snapshot holds what it holds. So each segment gets a second name here as
soon as it is there, and is read once its first name is gone: then nobody writes to it any more. What is found is
compared with nothing here; see proof.py.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from paramserver.shard.journal.layout import JournalError, SegmentReader
from paramserver.shard.journal.records import Pushed, TakenUp
from paramserver.shard.journal.replay import replay, restored
from paramserver.shard.journal.segments import LogReader
from paramserver.shard.journal.snapshot import load_newest
from paramserver.shard.journal.storage import OsFolder
from paramserver.shard.serving import Serving

_PATTERN = "segment-*.log"


class AuditError(Exception):
    """The journals cannot be followed, so nothing is proven. The text says where."""


class Stream(NamedTuple):
    """The updates of one worker's incarnation at one block: numbered from 1 without a gap."""

    worker: str
    incarnation: int
    block: int


@dataclass
class Journal:
    """What one journal has held so far."""

    last: int = 0  # number of the last record that was read
    applied: dict[Stream, int] = field(default_factory=dict)  # sequence of the last update
    updates: Counter[int] = field(default_factory=Counter)  # by block
    out_of_order: list[str] = field(default_factory=list)  # updates that were no successor of the one before them

    def take(self, record: Pushed) -> None:
        for update in record.updates:
            stream = Stream(record.worker, record.incarnation, update.block)
            expected = self.applied.get(stream, 0) + 1
            if update.sequence != expected:
                self.out_of_order.append(f"{stream}: update {update.sequence} instead of {expected}")
            self.applied[stream] = max(update.sequence, expected - 1)
            self.updates[update.block] += 1


class JournalTap:
    """Follows all journals of a job below the folders of the shards' state. Used from one thread; call `look` often.

    Args:
        state: what the shards have as --state, on one file system with `kept`.
        kept: an empty folder for the second names.
    """

    def __init__(self, state: Path, job: str, kept: Path) -> None:
        self._state = state
        self._job = job
        self._kept = kept
        self.journals: dict[Path, Journal] = {}  # by the journal's folder

    def look(self) -> None:
        """Give second names to new segments, and read those that are dropped. Raises AuditError, OSError."""
        for folder in self._folders():
            journal = self.journals.setdefault(folder, Journal())
            kept = self._names_of(folder)
            for path in sorted(folder.glob(_PATTERN)):
                self._keep(path, kept)
            for path in sorted(kept.iterdir()):
                if path.stat().st_nlink == 1:
                    self._read(path, journal)

    def finish(self) -> None:
        """Read the rest. Call when no shard lives any more. Raises AuditError, OSError."""
        self.look()
        for folder, journal in self.journals.items():
            for path in sorted(self._names_of(folder).iterdir()):
                self._read(path, journal)

    def _folders(self) -> list[Path]:
        """Those with segments: a shard may have several journals of a job, below a folder of the job's name."""
        found = {path.parent for path in self._state.glob(f"*/{self._job}/**/{_PATTERN}")}
        return sorted(found | self.journals.keys())

    def _names_of(self, folder: Path) -> Path:
        kept = self._kept / folder.relative_to(self._state)
        kept.mkdir(parents=True, exist_ok=True)
        return kept

    @staticmethod
    def _keep(path: Path, kept: Path) -> None:
        """The inode is part of the second name: a segment that its maker gave up has a namesake later."""
        try:
            own = kept / f"{path.stem}.{path.stat().st_ino}"
            if not own.exists():
                os.link(path, own)
        except FileNotFoundError:
            pass  # it was dropped in this moment; if it held anything, its number is missed

    def _read(self, path: Path, journal: Journal) -> None:
        first = int(path.name.split(".")[0].removeprefix("segment-"))
        try:
            entries = list(SegmentReader(path.name, path.read_bytes(), first))
        except JournalError as error:
            raise AuditError(str(error)) from None
        if entries:
            if first != journal.last + 1:
                raise AuditError(
                    f"{path}: begins with record {first}, the one before it that was read is {journal.last}: a segment "
                    "was removed before it was looked at; look more often"
                )
            for entry in entries:
                if isinstance(entry.record, Pushed):
                    journal.take(entry.record)
            journal.last = entries[-1].number
        path.unlink()


def final_versions(folder: Path) -> dict[int, int]:
    """Each block's version in the state that a journal ends with: its last snapshot, and the rest applied again.

    Raises AuditError, OSError. No process may hold the journal.
    """
    held = OsFolder(folder)
    try:
        snapshot = load_newest(held)
        serving = None if snapshot is None else restored(snapshot[0].state, snapshot[1])
        for entry in LogReader(held, 0 if snapshot is None else snapshot[0].number):
            if serving is not None:
                replay(serving, entry)
            elif isinstance(entry.record, TakenUp):
                serving = Serving(entry.record.order)
    except JournalError as error:
        raise AuditError(str(error)) from None
    finally:
        held.close()
    if serving is None:
        raise AuditError(f"{folder}: has neither a snapshot nor a first record")
    return {index: block.version for index, block in serving.blocks.items()}
