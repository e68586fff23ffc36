"""One folder of files: the seam between the journal and the operating system. Methods raise OSError.

What `write` returned for survives the death of the process; what `sync` returned for survives that of the machine.
Names of files are as durable as the last `sync` of the folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from paramserver.protocol.transport import Buffer, Bytes

_MOST_BUFFERS = 1024  # of one call, as POSIX allows


class File(Protocol):
    """A file that only grows, but for `truncate`."""

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Put these bytes at the end. After an OSError some of them may be there: truncate before going on."""
        ...

    def truncate(self, size: int) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Folder(Protocol):
    """Files without folders in it. Held by one process, from when it is made until `close`."""

    @property
    def path(self) -> str:
        """For messages."""
        ...

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes | memoryview: ...

    def size(self, name: str) -> int:
        """Bytes that the file has now."""
        ...

    def read_into(self, name: str, at: int, buffer: Bytes) -> None:
        """Fill the buffer with the file's bytes from `at` on. Raises OSError where it has fewer."""
        ...

    def create(self, name: str) -> File:
        """A new, empty file; one that is there is emptied."""
        ...

    def append(self, name: str) -> File:
        """A file that is there, to write at its end."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Give a file another name at once; a file of that name is gone."""
        ...

    def remove(self, name: str) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class OsFile:
    def __init__(self, path: Path, flags: int) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | flags, 0o600)

    def write(self, buffers: Sequence[Buffer]) -> None:
        for first in range(0, len(buffers), _MOST_BUFFERS):
            left = [memoryview(buffer).cast("B") for buffer in buffers[first : first + _MOST_BUFFERS] if len(buffer)]
            while left:
                written = os.writev(self._descriptor, left)
                while left and written >= len(left[0]):
                    written -= len(left.pop(0))
                if written:
                    left[0] = left[0][written:]

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class OsFiles:
    """The files of a folder of the file system, to read. Raises OSError."""

    _path: Path

    @property
    def path(self) -> str:
        return str(self._path)

    def names(self) -> list[str]:
        return sorted(os.listdir(self._path))

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def size(self, name: str) -> int:
        return (self._path / name).stat().st_size

    def read_into(self, name: str, at: int, buffer: Bytes) -> None:
        descriptor = os.open(self._path / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            left = memoryview(buffer.data)
            while len(left):
                got = os.preadv(descriptor, [left], at)
                if not got:
                    raise OSError(errno.EIO, f"{name} ends at byte {at}, {len(left)} bytes early")
                left, at = left[got:], at + got
        finally:
            os.close(descriptor)


class OsFolder(OsFiles):
    """A folder of the file system, made where it is not there.

    Raises OSError; BlockingIOError where another process holds it. The kernel lets go of it when its holder dies.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sync_path(path.parent)
        except BaseException:
            os.close(self._descriptor)
            raise

    def create(self, name: str) -> OsFile:
        return OsFile(self._path / name, os.O_CREAT | os.O_TRUNC)

    def append(self, name: str) -> OsFile:
        return OsFile(self._path / name, 0)

    def rename(self, old: str, new: str) -> None:
        os.replace(self._path / old, self._path / new)

    def remove(self, name: str) -> None:
        os.unlink(self._path / name)

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def remove_others(parent: Path, keep: str, spared: str) -> None:
    """Remove the folders beside `keep`, but for those that hold a file `spared`. Raises OSError."""
    if parent.is_dir():
        for folder in parent.iterdir():
            if folder.is_dir() and folder.name != keep and not (folder / spared).exists():
                shutil.rmtree(folder)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
