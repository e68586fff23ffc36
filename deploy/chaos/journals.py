"""Every record that the journals of a cluster ever held, read while the shards drop what their snapshots make needless.

A shard removes a segment of its log when a snapshot holds what it holds. So each segment gets a second name here as
soon as it is there, and is read once its first name is gone: then nobody writes to it any more. What is found is
compared with nothing here; see copies.py and proof.py.
"""

from __future__ import annotations

import os
from pathlib import Path

from deploy.chaos.copies import AuditError, Journal, Piece, make_piece, merge
from paramserver.shard.journal.layout import JournalError, SegmentReader
from paramserver.shard.journal.records import TakenUp
from paramserver.shard.journal.replay import replay, restored
from paramserver.shard.journal.segments import LogReader
from paramserver.shard.journal.snapshot import load_newest
from paramserver.shard.journal.storage import OsFolder
from paramserver.shard.serving import Serving

_PATTERN = "segment-*.log"


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
        self._pieces: dict[Path, list[Piece]] = {}  # by the folder of a copy of a journal
        self._names: dict[Path, Path] = {}

    def look(self) -> None:
        """Give second names to new segments, and read those that are dropped. Raises AuditError, OSError."""
        for folder in self._folders():
            pieces = self._pieces.setdefault(folder, [])
            kept = self._names_of(folder)
            for path in sorted(folder.glob(_PATTERN)):
                self._keep(path, kept)
            for path in sorted(kept.iterdir()):
                if path.stat().st_nlink == 1:
                    self._read(path, folder, pieces)

    def finish(self) -> dict[str, tuple[Journal, Path]]:
        """Read the rest: each part's journal, and the folder of its copy that goes farthest. Call when no shard lives.

        Raises AuditError, OSError.
        """
        self.look()
        for folder, pieces in self._pieces.items():
            for path in sorted(self._names_of(folder).iterdir()):
                self._read(path, folder, pieces)
        parts: dict[str, list[Piece]] = {}
        for folder, pieces in self._pieces.items():
            parts.setdefault(self._part_of(folder), []).extend(pieces)
        return {part: merge(part, pieces) for part, pieces in sorted(parts.items())}

    def _folders(self) -> list[Path]:
        """Those with segments: a shard may have several journals of a job, below a folder of the job's name."""
        found = {path.parent for path in self._state.glob(f"*/{self._job}/**/{_PATTERN}")}
        return sorted(found | self._pieces.keys())

    def _part_of(self, folder: Path) -> str:
        """The folders are SHARD/JOB, the whole of what the shard holds, or SHARD/JOB/PART."""
        shard, _, *part = folder.relative_to(self._state).parts
        return "/".join(part) or shard

    def _names_of(self, folder: Path) -> Path:
        """The folder of the second names of a copy's segments."""
        kept = self._names.setdefault(folder, self._kept / str(len(self._names)))
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
            pass  # it was dropped in this moment; if it held anything, its records are missed

    @staticmethod
    def _read(path: Path, folder: Path, pieces: list[Piece]) -> None:
        first = int(path.name.split(".")[0].removeprefix("segment-"))
        try:
            piece = make_piece(folder, first, SegmentReader(path.name, path.read_bytes(), first))
        except JournalError as error:
            raise AuditError(str(error)) from None
        if piece.updates:
            pieces.append(piece)
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
