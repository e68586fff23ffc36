"""A worker's account of what was acknowledged to it: an append-only file that outlives the worker.

With it, and with the shards' journals, it can be proven after the death of any process that no acknowledged update is
lost (`paramserver chaos`). An entry is in the file before the worker forgets the update, and stays there when the
process is killed, for the system has it then; it is not made durable against the death of the machine.

    account: entry ...
    entry:   block u32 | step u32 | sequence u64, little-endian
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ENTRY = struct.Struct("<IIQ")
ENTRY_BYTES = _ENTRY.size
_NAME = re.compile(r"(?P<worker>.+)\.(?P<incarnation>[0-9]+)\.account")


class Acknowledged(NamedTuple):
    """One update of a block, as the worker named it."""

    block: int
    step: int  # the worker's clock
    sequence: int


class Account:
    """The account of one incarnation of a worker for one job. Used from one thread.

    Args:
        folder: of the accounts of all workers; made where it is not there.
    """

    def __init__(self, folder: Path, job: str, worker: str, incarnation: int) -> None:
        """Raises OSError."""
        path = folder / job / f"{worker}.{incarnation}.account"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def note(self, block: int, step: int, sequence: int) -> None:
        """An update is acknowledged. Raises OSError where that cannot be written: the account would be short."""
        written = os.write(self._descriptor, _ENTRY.pack(block, step, sequence))
        if written != ENTRY_BYTES:
            raise OSError(f"the account took {written} of {ENTRY_BYTES} bytes")

    def close(self) -> None:
        os.close(self._descriptor)


def account_files(folder: Path, job: str) -> dict[tuple[str, int], Path]:
    """The accounts that workers have left for a job, by (worker, incarnation)."""
    found = {}
    for path in sorted((folder / job).glob("*.account")):
        if (match := _NAME.fullmatch(path.name)) is not None:
            found[match["worker"], int(match["incarnation"])] = path
    return found


def read_account(path: Path) -> Iterator[Acknowledged]:
    """The entries in their order; half of one at the end is of an update that was not forgotten. Raises OSError."""
    data = path.read_bytes()
    for entry in _ENTRY.iter_unpack(data[: len(data) // ENTRY_BYTES * ENTRY_BYTES]):
        yield Acknowledged(*entry)
