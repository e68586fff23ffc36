"""A snapshot: the whole state of a shard after one record, so that the log before it can go.

Two files, each written aside, made durable and then given its name: `snapshot-N.safetensors` with the arrays, then
`snapshot-N.json`, the manifest, whose name makes the snapshot exist. N is the number of the last record in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import msgspec
import numpy as np
import safetensors.numpy
from msgspec import Struct
from safetensors import SafetensorError

from paramserver.checksum import crc32
from paramserver.shard.journal.layout import JournalError
from paramserver.shard.journal.states import FORMAT, Arrays, State
from paramserver.shard.journal.storage import File, Folder

_PREFIX, _ARRAYS, _MANIFEST, ASIDE = "snapshot-", ".safetensors", ".json", ".new"
_DTYPES = {"float32": "F32", "int64": "I64"}


class Manifest(Struct, frozen=True):
    """The state but for its arrays, and the checksums of these (CRC-32)."""

    format: int
    number: int
    build: str
    layout: str  # fingerprint
    checksums: dict[str, int]
    state: State


class SnapshotWriter:
    """Two steps, so that the second one, which waits for the disk, may run in another thread. Both raise OSError."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def write(self, number: int, build: str, state: State, arrays: Arrays) -> Written:
        """Write the arrays as they are now; afterwards they may change."""
        checksums = {name: crc32(array.data) for name, array in arrays.items()}
        name = f"{_PREFIX}{number:016d}"
        file = self._folder.create(name + _ARRAYS + ASIDE)
        try:
            file.write([file_head(arrays), *(array.data.cast("B") for array in arrays.values() if array.size)])
        except BaseException:
            file.close()
            raise
        manifest = Manifest(FORMAT, number, build, state.order.layout.fingerprint, checksums, state)
        return Written(name, file, msgspec.json.encode(manifest))

    def seal(self, written: Written) -> None:
        """Make it durable and give it its name; then older snapshots are removed."""
        try:
            written.arrays.sync()
        finally:
            written.arrays.close()
        arrays, manifest = written.name + _ARRAYS, written.name + _MANIFEST
        self._folder.rename(arrays + ASIDE, arrays)
        file = self._folder.create(manifest + ASIDE)
        try:
            file.write([written.manifest])
            file.sync()
        finally:
            file.close()
        self._folder.sync()  # or the manifest's name could outlive that of the arrays
        self._folder.rename(manifest + ASIDE, manifest)
        self._folder.sync()
        # Manifests first: one without its arrays would be damage.
        for suffix in (_MANIFEST, _ARRAYS):
            for name in self._folder.names():
                if name.startswith(_PREFIX) and name.endswith(suffix) and name != written.name + suffix:
                    self._folder.remove(name)


def snapshot_names(number: int) -> tuple[str, str]:
    """The files of a snapshot: its manifest and its arrays."""
    name = f"{_PREFIX}{number:016d}"
    return name + _MANIFEST, name + _ARRAYS


def newest_number(folder: Folder) -> int | None:
    """Of the last record in the newest snapshot; None where there is none."""
    names = [name for name in folder.names() if name.startswith(_PREFIX) and name.endswith(_MANIFEST)]
    return int(max(names)[len(_PREFIX) : -len(_MANIFEST)]) if names else None


class Written:
    """A snapshot whose arrays are in a file without its name."""

    def __init__(self, name: str, arrays: File, manifest: bytes) -> None:
        self.name, self.arrays, self.manifest = name, arrays, manifest


def file_head(arrays: Arrays, metadata: Mapping[str, str] | None = None) -> bytes:
    """What begins a safetensors file of these arrays. Written by hand: the library wants all of them in one buffer
    or writes to a path of its own, and tells of no full disk."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, array in arrays.items():
        entries[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def clean(folder: Folder) -> None:
    """Remove what a process that died left aside. Raises OSError."""
    for name in folder.names():
        if name.endswith(ASIDE):
            folder.remove(name)


def load_newest(folder: Folder) -> tuple[Manifest, Arrays] | None:
    """The last snapshot, checked; None where there is none. Raises JournalError, OSError."""
    names = [name for name in folder.names() if name.startswith(_PREFIX) and name.endswith(_MANIFEST)]
    if not names:
        return None
    name = max(names)
    where = f"{folder.path}/{name}"
    mend = "restore the folder from a copy, or submit the job again"
    try:
        content = msgspec.json.decode(folder.read(name))
        if content.get("format") != FORMAT:
            raise JournalError(
                f"{where}: has format {content.get('format')}, this release knows {FORMAT}; start the shard with the "
                "release that wrote it"
            )
        manifest = msgspec.convert(content, Manifest)
    except (msgspec.MsgspecError, AttributeError) as error:
        raise JournalError(f"{where}: damaged: {error}; {mend}") from None
    file = name.removesuffix(_MANIFEST) + _ARRAYS
    where = f"{folder.path}/{file}"
    try:
        arrays = cast(Arrays, safetensors.numpy.load(bytes(folder.read(file))))
    except (SafetensorError, KeyError, ValueError) as error:
        raise JournalError(f"{where}: damaged: {error}; {mend}") from None
    for array, checksum in manifest.checksums.items():
        if array not in arrays or crc32(np.ascontiguousarray(arrays[array]).data) != checksum:
            raise JournalError(f"{where}: damaged: array {array!r} is not what was written; {mend}")
    return manifest, arrays
