"""What the core asks of the loop around it, in order: messages to send and facts to store.

Facts come before the messages that rest on them, so that nothing is promised that a restart would forget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paramserver.coordinator.checkpoints.manifest import Manifest
from paramserver.protocol.messages import LeaseDone, Message
from paramserver.protocol.transport import Peer


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as the store keeps it. `number` is its place in the queue; `specification` the resolved JSON."""

    id: str
    number: int
    specification: str
    warnings: tuple[str, ...]
    submitted: str  # wall clock, ISO 8601
    state: str = "queued"
    reason: str = ""  # why it failed or was cancelled


@dataclass(frozen=True, slots=True)
class LeaseResult:
    """A lease that is done, with what it was: kind and split."""

    kind: str
    split: str
    examples: int
    done: LeaseDone


@dataclass(frozen=True, slots=True)
class Send:
    peer: Peer
    message: Message


@dataclass(frozen=True, slots=True)
class SaveName:
    name: str
    incarnation: int
    key: str = ""  # of the process that carries it, where the cluster uses keys


@dataclass(frozen=True, slots=True)
class SaveJob:
    """A new job, or the state of a known one."""

    record: JobRecord


@dataclass(frozen=True, slots=True)
class SaveDocument:
    """One of a job's documents, replaced as a whole: "placed", "progress", "resume" or "result"."""

    job: str
    kind: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SaveDone:
    job: str
    result: LeaseResult


@dataclass(frozen=True, slots=True)
class StorePart:
    """Bytes of the export. `data` is a view that is valid until the effect is carried out."""

    job: str
    offset: int  # 0 begins the file anew
    data: memoryview


@dataclass(frozen=True, slots=True)
class SealModel:
    """All bytes are there: make them durable, then visible under their name."""

    job: str


@dataclass(frozen=True, slots=True)
class WriteResult:
    job: str
    result: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AppendMetrics:
    job: str
    figures: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Happened:
    """Something that people should find in the log as well."""

    job: str
    text: str


@dataclass(frozen=True, slots=True)
class StorePiece:
    """Bytes of a checkpoint's file. `data` is a view that is valid until the effect is carried out."""

    job: str
    number: int
    file: str
    offset: int  # 0 begins the file anew
    data: memoryview


@dataclass(frozen=True, slots=True)
class SealCheckpoint:
    """All its files are there: make them durable and the checkpoint exist, and tell the core what came of it."""

    job: str
    number: int
    manifest: Manifest
    keep: int


@dataclass(frozen=True, slots=True)
class DropCheckpoint:
    job: str
    number: int


@dataclass(frozen=True, slots=True)
class SendBlock:
    """Read what the checkpoint that the job goes on from holds of a block, and send it."""

    peer: Peer
    job: str
    part: str
    block: int


@dataclass(frozen=True, slots=True)
class SendState:
    """The same for a piece of a worker's file; `worker` is empty where there is nothing for it."""

    peer: Peer
    job: str
    worker: str
    offset: int


Effect = (
    Send
    | SaveName
    | SaveJob
    | SaveDocument
    | SaveDone
    | StorePart
    | SealModel
    | WriteResult
    | AppendMetrics
    | Happened
    | StorePiece
    | SealCheckpoint
    | DropCheckpoint
    | SendBlock
    | SendState
)
