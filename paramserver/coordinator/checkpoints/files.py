"""The folder runs/<job>/checkpoints: each checkpoint appears whole, under its number, or not at all.

    N/checkpoint.json         the manifest
    N/part-0.safetensors ...  a file for each part of the model
    N/worker-0.safetensors    and for each worker that had something of its own

A checkpoint is written into `.N.new`, synced file by file, and then the folder is renamed. Methods raise OSError.
"""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from msgspec import structs

from paramserver.coordinator.checkpoints.manifest import FILE_NAME, Manifest, encode_manifest

FOLDER = "checkpoints"
ASIDE = ".new"
REMOVED = ".old"


class CheckpointFiles:
    """Of one run, whose folder is `run`."""

    def __init__(self, run: Path) -> None:
        self.root = run / FOLDER

    def store(self, number: int, file: str, offset: int, data: memoryview) -> None:
        """Put bytes at `offset`; 0 begins the file anew."""
        if not offset:
            self._aside(number).mkdir(parents=True, exist_ok=True)
        with (self._aside(number) / file).open("r+b" if offset else "wb") as stream:
            stream.seek(offset)
            stream.write(data)

    def drop(self, number: int) -> None:
        """Forget a checkpoint that is not whole."""
        shutil.rmtree(self._aside(number), ignore_errors=True)

    def seal(self, number: int, manifest: Manifest, keep: int) -> None:
        """Make a whole checkpoint durable, then visible; then older ones than the newest `keep` go.

        May take seconds: not for the loop's thread.
        """
        aside = self._aside(number)
        for kept in manifest.files:
            _sync(aside / kept.file)
        taken = datetime.now(UTC).isoformat(timespec="seconds")
        with (aside / FILE_NAME).open("wb") as stream:
            stream.write(encode_manifest(structs.replace(manifest, taken=taken)))
            stream.flush()
            os.fsync(stream.fileno())
        _sync(aside)
        aside.rename(self.root / str(number))
        _sync(self.root)
        for left in self.root.iterdir():
            if left.name.startswith(".") and left.name.endswith((ASIDE, REMOVED)):
                shutil.rmtree(left)  # of a coordinator that died in the middle of it
        for old in numbers(self.root)[keep:]:
            # Out of sight first: half of a checkpoint is none.
            removed = self.root / f".{old}{REMOVED}"
            (self.root / str(old)).rename(removed)
            shutil.rmtree(removed)

    def _aside(self, number: int) -> Path:
        return self.root / f".{number}{ASIDE}"


def numbers(folder: Path) -> list[int]:
    """Those of the checkpoints in a folder, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
