"""A checkpoint that is opened to go on from: found, checked, and read block by block.

Whatever is damaged, half-written or of another job is refused with a CheckpointError, before anything rests on it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from paramserver.checksum import crc32
from paramserver.coordinator.checkpoints.files import FOLDER, numbers
from paramserver.coordinator.checkpoints.manifest import (
    FILE_NAME,
    CheckpointError,
    KeptFile,
    Manifest,
    decode_manifest,
)
from paramserver.job import Job, lease_examples_of
from paramserver.protocol.workerfile import KeptResidual, KeptWorker, Mark, adopted
from paramserver.router.leases import LeaseBook, LeaseError
from paramserver.shard.checkpoint import KeptBlockState, KeptPart, blocks_of, named, parse_head

READ_BYTES = 2**20  # at a time, where a whole file is checked
MAY_CHANGE = ("name", "device", "cluster", "durability", "checkpoint", "stop")
"""Fields of a job that may be others in a run that goes on from a checkpoint."""

_PLACE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:/(?:checkpoints/)?([0-9]{1,18}))?")


@dataclass(frozen=True)
class _PartFile:
    path: Path
    body_at: int
    arrays: dict[str, tuple[str, int, int]]  # name -> type, first byte and end within the body
    blocks: dict[int, KeptBlockState]


@dataclass(frozen=True)
class _WorkerFile:
    path: Path
    bytes: int
    kept: KeptWorker
    adopted: tuple[KeptResidual, ...]  # those that still fit their block


class Checkpoint:
    """One that is whole. Made by `open_checkpoint`; used by one thread."""

    def __init__(
        self, folder: Path, manifest: Manifest, parts: dict[str, _PartFile], workers: dict[str, _WorkerFile]
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.workers = workers
        self._of_block = {block: part for part in parts.values() for block in part.blocks}

    @property
    def place(self) -> str:
        """RUN/N, as people name it."""
        return f"{self.manifest.job}/{self.manifest.number}"

    def block(self, index: int) -> tuple[str, list[str], list[bytes]]:
        """What is kept of a block: its state as JSON, the names and bytes of its arrays. Raises OSError, KeyError."""
        part = self._of_block[index]
        names = named(index, part.arrays)
        with part.path.open("rb") as file:
            bodies = []
            for name in names:
                _, first, end = part.arrays[name]
                file.seek(part.body_at + first)
                bodies.append(_exactly(file.read(end - first), end - first, part.path))
        return msgspec.json.encode(part.blocks[index]).decode(), names, bodies

    def state(self, worker: str, offset: int, size: int) -> bytes:
        """A piece of a worker's file. Raises OSError, KeyError."""
        with self.workers[worker].path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _exactly(content: bytes, size: int, path: Path) -> bytes:
    if len(content) != size:
        raise OSError(f"{path}: ends after {len(content)} of {size} bytes: it was changed after it had been checked")
    return content


def open_checkpoint(folder: Path, is_checked: bool = False) -> Checkpoint:
    """Open a checkpoint's folder and check every byte of it; `is_checked`: it was checked before, look at heads only.

    May take seconds. Raises CheckpointError.
    """
    where = folder / FILE_NAME
    try:
        manifest = decode_manifest(where.read_bytes(), str(where))
        parts: dict[str, _PartFile] = {}
        own: list[tuple[KeptFile, KeptWorker]] = []
        for file in manifest.files:
            path = folder / Path(file.file).name
            if not is_checked:
                _check(path, file)
            if file.kind == "part":
                parts[file.name] = _part_file(path)
            else:
                own.append((file, _worker_of(path)))
    except OSError as error:
        raise CheckpointError(f"{folder}: is not whole: {error}") from None
    found = sorted(index for part in parts.values() for index in part.blocks)
    if found != list(range(len(manifest.layout.blocks))):
        raise CheckpointError(f"{folder}: holds {len(found)} blocks, not each of the model's once")
    if manifest.layout.fingerprint != manifest.fingerprint:
        raise CheckpointError(f"{where}: its layout is not the one that it was written with")
    marks: dict[int, dict[str, Mark]] = {
        index: kept.block.marks for part in parts.values() for index, kept in part.blocks.items()
    }
    workers = {
        kept.worker: _WorkerFile(folder / file.file, file.bytes, kept, adopted(kept, marks)) for file, kept in own
    }
    return Checkpoint(folder, manifest, parts, workers)


def _check(path: Path, file: KeptFile) -> None:
    checksum = size = 0
    with path.open("rb") as stream:
        while piece := stream.read(READ_BYTES):
            checksum, size = crc32(piece, checksum), size + len(piece)
    if size != file.bytes:
        raise CheckpointError(f"{path}: has {size} bytes, {file.bytes} were written")
    if checksum != file.checksum:
        raise CheckpointError(f"{path}: damaged: its checksum is not the one that was written down")


def _head(path: Path) -> tuple[bytes, int]:
    """The head of a safetensors file, and where its body begins."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise CheckpointError(f"{path}: is no safetensors file")
        return file.read(size), 8 + size


def _part_file(path: Path) -> _PartFile:
    head, body_at = _head(path)
    try:
        arrays, kept = parse_head(head)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: does not say what it holds: {error!r}") from None
    assert isinstance(kept, KeptPart)
    return _PartFile(path, body_at, arrays, blocks_of(kept.state))


def _worker_of(path: Path) -> KeptWorker:
    head, _ = _head(path)
    try:
        return msgspec.json.decode(json.loads(head)["__metadata__"]["worker"], type=KeptWorker)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: does not say whose it is: {error!r}") from None


# ----------------------------------------------------------------------------------- finding


def find_checkpoint(runs: Path, job: Job, wanted: str) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that a job goes on from, and what its submitter should know.

    Args:
        wanted: empty: the newest whole one of the newest run of the job's name; else "RUN" or "RUN/N".

    A damaged one is passed over for the one before, which is said; but not where "RUN/N" names it. May take seconds.
    Raises CheckpointError.
    """
    notes: list[str] = []
    if wanted:
        candidates = _named(runs, wanted)
    else:
        names = runs_of(runs, job.name)
        candidates = [runs / run / FOLDER / str(number) for run in names for number in numbers(runs / run / FOLDER)]
        if candidates and candidates[0].parent.parent.name != names[0]:
            notes.append(f"the newest run, {names[0]!r}, has no checkpoint: an older run's is gone on from")
    for folder in candidates:
        try:
            checkpoint = open_checkpoint(folder)
        except CheckpointError as error:
            notes.append(f"passed over a checkpoint: {error}")
            if _PLACE.fullmatch(wanted) and "/" in wanted:
                break  # this one and no other
            continue
        check_same(job, checkpoint.manifest)
        return checkpoint, notes
    if notes:
        raise CheckpointError("; ".join(notes) + "; submit the job without --resume, or restore the files from a copy")
    raise CheckpointError(
        f"there is no checkpoint of {wanted or job.name!r} in {runs}; take one with `paramserver checkpoint JOB` or by "
        "checkpoint.every_seconds, or submit the job without --resume"
    )


def _named(runs: Path, wanted: str) -> list[Path]:
    match = _PLACE.fullmatch(wanted)
    if match is None:
        raise CheckpointError(f"{wanted[:200]!r} names no checkpoint; write RUN or RUN/N, for example char-lm/3")
    folder = runs / match[1] / FOLDER
    found = numbers(folder)
    chosen = found if match[2] is None else [number for number in found if number == int(match[2])]
    return [folder / str(number) for number in chosen]


def runs_of(runs: Path, name: str) -> list[str]:
    """The ids of all runs of a job's name, the newest first."""
    found: list[tuple[int, str]] = []
    for run in runs.iterdir() if runs.is_dir() else ():
        suffix = run.name.removeprefix(name).removeprefix("-")
        is_id = run.name == name or (run.name.startswith(f"{name}-") and suffix.isdecimal())
        if is_id and _name_in(run) == name:
            found.append((int(suffix or 1), run.name))
    return [run for _, run in sorted(found, reverse=True)]


def _name_in(run: Path) -> str:
    """The name in a run's job.yaml; empty where there is none."""
    try:
        content = yaml.safe_load((run / "job.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    return str(content.get("name", "")) if isinstance(content, dict) else ""


def check_same(job: Job, manifest: Manifest) -> None:
    """Raise CheckpointError where the job differs from the checkpoint's in a field that its state rests on."""
    was: Any = json.loads(manifest.specification)
    now = job.model_dump(mode="json")
    different = [
        difference
        for field in sorted({*was, *now} - set(MAY_CHANGE))
        for difference in _differences(field, was.get(field), now.get(field))
    ]
    if different:
        raise CheckpointError(
            f"checkpoint {manifest.job}/{manifest.number} is of another job: {'; '.join(different)}; a job that goes "
            f"on from it may only change {', '.join(MAY_CHANGE)}: change it back, or submit it without --resume"
        )
    _check_epochs(job, manifest)


def _check_epochs(job: Job, manifest: Manifest) -> None:
    """Raise CheckpointError where the examples of the checkpoint make no lease book of this job."""
    book = LeaseBook(lease_examples_of(job), job.stop.epochs, job.seed)
    try:
        book.declare(manifest.examples)
    except LeaseError as error:
        raise CheckpointError(f"checkpoint {manifest.job}/{manifest.number}: {error}") from None


def _differences(field: str, was: Any, now: Any) -> list[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            difference
            for key in sorted({*was, *now})
            for difference in _differences(f"{field}.{key}", was.get(key), now.get(key))
        ]
    return [] if was == now else [f"{field}: found {now!r}, the checkpoint's is {was!r}"]
