"""The manifest of a checkpoint: which files it has, and everything that the coordinator must know to go on from it.

`checkpoint.json` is written last, and its name in the folder's final place makes the checkpoint exist. It holds its own
checksum, so that no flipped bit of it is believed.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from paramserver.checksum import crc32
from paramserver.protocol.layout import Layout
from paramserver.router.leases import LeaseCut

FORMAT = 1
FILE_NAME = "checkpoint.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be gone on from; the text says which file, what was found, and what to do."""


class KeptFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the checkpoint. `name` is the part's or the worker's; `checksum` is the CRC-32 of all its bytes."""

    file: str
    kind: Literal["part", "worker"]
    name: str
    bytes: int
    checksum: int


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    job: str  # id of the run
    number: int
    taken: str  # wall clock, ISO 8601
    specification: str  # the resolved job as JSON
    layout: Layout
    fingerprint: str
    examples: dict[str, int]  # by split
    leases: LeaseCut
    sums: dict[str, dict[str, float]]  # of what is done, by split
    metric_sums: dict[str, dict[str, float]]
    files: tuple[KeptFile, ...]


class _Envelope(Struct, frozen=True, forbid_unknown_fields=True):
    crc32: int
    manifest: msgspec.Raw


def encode_manifest(manifest: Manifest) -> bytes:
    body = msgspec.json.encode(manifest)
    return msgspec.json.encode(_Envelope(crc32(body), msgspec.Raw(body)))


def decode_manifest(content: bytes, where: str) -> Manifest:
    """The manifest, checked. Raises CheckpointError, naming `where`."""
    try:
        envelope = msgspec.json.decode(content, type=_Envelope)
        if crc32(bytes(envelope.manifest)) != envelope.crc32:
            raise CheckpointError(f"{where}: damaged: its checksum is not that of its content")
        found = msgspec.json.decode(envelope.manifest, type=dict[str, object]).get("format")
        if found != FORMAT:
            raise CheckpointError(f"{where}: has format {found}, this release knows {FORMAT}")
        return msgspec.json.decode(envelope.manifest, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{where}: damaged: {error}") from None
