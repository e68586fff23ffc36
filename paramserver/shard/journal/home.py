"""Where a shard process keeps its journals: a folder a job and part under the shard's name, and only those of the last
job, but for jobs whose `durability.keep` is "all"."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Protocol

from paramserver.job import Job
from paramserver.protocol.messages import PartOrder
from paramserver.shard.journal.keeper import ShardJournal, open_journal
from paramserver.shard.journal.layout import JournalError
from paramserver.shard.journal.segments import segment_numbers
from paramserver.shard.journal.storage import Folder, OsFolder, remove_others
from paramserver.shard.serving import Serving

HELD_SECONDS = 5.0  # how long a predecessor that is ending may still hold its folder
LOOK_SECONDS = 0.1
FIRST_TERM = 1  # of a placement
KEPT = "kept"  # a file that spares a job's folder when the next job is taken up


class Home(Protocol):
    """Where journals are. Methods may take seconds: not for the loop's thread. Raise JournalError."""

    def open(self, order: PartOrder) -> tuple[Serving, ShardJournal]:
        """What is kept of the order's part, or a fresh state, and its journal; other jobs' are removed."""
        ...

    def hold(self, order: PartOrder) -> Folder:
        """The folder of the order's part, for a backup; other jobs' are removed."""
        ...


class JournalHome:
    """Args:
    state: the folder for what this machine's shards keep.
    shard: a name that can be a folder's. Raises JournalError for one that cannot.
    """

    def __init__(self, state: Path, shard: str) -> None:
        if shard in ("", ".", "..") or "/" in shard or "\0" in shard:
            raise JournalError(f"--name {shard!r} cannot be the name of a folder under --state; choose another name")
        self._root = state / shard
        self._opened: set[tuple[str, str]] = set()  # (job, part), by this process
        self._removing = Lock()  # several parts of a job are taken up at once, in threads of their own

    def open(self, order: PartOrder) -> tuple[Serving, ShardJournal]:
        with self._mapped(order):
            folder = self._held(order)
            try:
                self._must_be_its_own(folder, order)
                return open_journal(folder, order)
            except BaseException:
                folder.close()
                raise

    def hold(self, order: PartOrder) -> Folder:
        with self._mapped(order):
            return self._held(order)

    def _must_be_its_own(self, folder: OsFolder, order: PartOrder) -> None:
        """Raise JournalError for the journal of an earlier job with the same id.

        Under the first term nobody has held the part before: whoever takes it up after a death has a later one. Gone on
        with, such a journal would take the new job's updates for duplicates of the old one's.
        """
        key = order.job, order.part
        if order.term == FIRST_TERM and key not in self._opened and segment_numbers(folder):
            raise JournalError(
                f"{folder.path}: holds a journal already, but this job begins: it is of an earlier job {order.job!r}, "
                "from before the coordinator began with a fresh --state; move the folder away, and submit the job again"
            )
        self._opened.add(key)

    def _held(self, order: PartOrder) -> OsFolder:
        with self._removing:
            remove_others(self._root, order.job, KEPT)
        folder = self._hold(self._root / order.job / order.part)
        try:
            if Job.model_validate_json(order.specification).durability.keep == "all":
                (self._root / order.job / KEPT).touch()
        except BaseException:
            folder.close()
            raise
        return folder

    @contextmanager
    def _mapped(self, order: PartOrder) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise JournalError(
                f"{self._root / order.job / order.part}: cannot be used for the journal: {error.strerror or error}; "
                "make room, mend its permissions, or start the shard with another --state"
            ) from None

    @staticmethod
    def _hold(path: Path) -> OsFolder:
        deadline = time.monotonic() + HELD_SECONDS
        while True:
            try:
                return OsFolder(path)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise JournalError(
                        f"{path}: another process holds this journal for more than {HELD_SECONDS:.0f} s; "
                        "end it: two shards of one name cannot both go on"
                    ) from None
                time.sleep(LOOK_SECONDS)
