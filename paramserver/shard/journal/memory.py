"""A folder in memory whose process or machine can die at any operation, for deterministic tests of the journal.

A *process* that dies loses nothing that was written; of the write in which it died a part may be there. A *machine*
that dies also loses what was not synced: each file keeps what was synced and then some prefix of the rest, or all
of it with holes of zeros, as file systems write pages back in any order; names that were not synced are undone from
the last one on.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from paramserver.protocol.transport import Buffer, Bytes

_PAGE = 64  # smaller than real ones, so that small records lie on several


class CrashError(BaseException):
    """The simulated process is dead: nothing may catch this but the test that asked for it."""


@dataclass(eq=False)
class _Content:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


class MemoryFolder:
    """Args:
    seed: of what a crash leaves.
    capacity: bytes that all files together may have; beyond it writes raise OSError(ENOSPC).
    """

    def __init__(self, seed: int = 0, capacity: int | None = None) -> None:
        self.path = "memory"
        self.capacity = capacity
        self.operations = 0  # that could have failed so far
        self.crash_at: int | None = None  # the operation at which the process dies
        self._random = random.Random(seed)
        self._files: dict[str, _Content] = {}
        self._synced_names: dict[str, _Content] = {}
        self._changes: list[dict[str, _Content]] = []  # the names after each change since the last sync

    # ------------------------------------------------------------------------- faults

    def step(self) -> bool:
        """Count an operation. True where the process dies in it."""
        self.operations += 1
        return self.crash_at is not None and self.operations >= self.crash_at

    def restart(self, is_machine: bool) -> None:
        """What the next process finds, after the death of the process or of the machine."""
        self.crash_at = None
        if is_machine:
            states = [self._synced_names, *self._changes]
            self._files = dict(self._random.choice(states))
            for content in self._files.values():
                content.data = self._left_of(content)
        self._settle_names()
        for content in self._files.values():
            content.synced = bytes(content.data)

    def _left_of(self, content: _Content) -> bytearray:
        kept, whole = bytearray(content.synced), content.data
        if not whole.startswith(kept) or len(whole) == len(kept):
            return kept  # it was truncated, or nothing is missing
        length = self._random.randint(len(kept), len(whole))
        left = whole[:length]
        if self._random.random() < 0.5:
            for page in range(len(kept) // _PAGE + 1, length // _PAGE + 1):
                if self._random.random() < 0.5:
                    hole = slice(page * _PAGE, min(length, (page + 1) * _PAGE))
                    left[hole] = bytes(hole.stop - hole.start)
        return left

    def damage(self, name: str, at: int) -> None:
        """Turn over the bits of one byte of a file."""
        self._files[name].data[at] ^= 0xFF

    # ------------------------------------------------------------- as storage.Folder has it

    def names(self) -> list[str]:
        return sorted(self._files)

    def read(self, name: str) -> bytes:
        return bytes(self._files[name].data)

    def size(self, name: str) -> int:
        return len(self._files[name].data)

    def read_into(self, name: str, at: int, buffer: Bytes) -> None:
        data = self._files[name].data[at : at + buffer.size]
        if len(data) < buffer.size:
            raise OSError(errno.EIO, f"{name} ends {buffer.size - len(data)} bytes early")
        buffer[:] = np.frombuffer(data, np.uint8)

    def create(self, name: str) -> MemoryFile:
        self._operate()
        self._files[name] = _Content()
        self._name_changed()
        return MemoryFile(self, self._files[name])

    def append(self, name: str) -> MemoryFile:
        return MemoryFile(self, self._files[name])

    def rename(self, old: str, new: str) -> None:
        self._operate()
        self._files[new] = self._files.pop(old)
        self._name_changed()

    def remove(self, name: str) -> None:
        self._operate()
        del self._files[name]
        self._name_changed()

    def sync(self) -> None:
        self._operate()
        self._settle_names()

    def close(self) -> None:
        pass

    def _operate(self) -> None:
        if self.step():
            raise CrashError

    def _name_changed(self) -> None:
        self._changes.append(dict(self._files))

    def _settle_names(self) -> None:
        self._synced_names, self._changes = dict(self._files), []

    def write(self, content: _Content, data: bytes) -> None:
        if self.step():
            content.data += data[: self._random.randint(0, len(data))]
            raise CrashError
        room = len(data)
        if self.capacity is not None:
            room = self.capacity - sum(len(other.data) for other in self._files.values())
        content.data += data[: max(0, room)]
        if room < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")


class MemoryFile:
    def __init__(self, folder: MemoryFolder, content: _Content) -> None:
        self._folder = folder
        self._content = content

    def write(self, buffers: Sequence[Buffer]) -> None:
        self._folder.write(self._content, b"".join(buffers))

    def truncate(self, size: int) -> None:
        if self._folder.step():
            raise CrashError
        del self._content.data[size:]

    def sync(self) -> None:
        if self._folder.step():
            raise CrashError
        self._content.synced = bytes(self._content.data)

    def close(self) -> None:
        pass
