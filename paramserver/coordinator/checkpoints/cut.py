"""How a checkpoint of a running job is made: a cut through all its processes, then their files. No I/O, no clock.

1. *gathering*: every live worker stops at its next boundary, with nothing on its way, and copies what is its own.
2. *copying*: every part of the model copies its state. When all have, the workers go on.
3. *storing*: the copies come in, piece by piece, while training goes on.
4. *sealing*: the files are made durable; then the manifest makes the checkpoint exist.

Training stands still in the first two only, and together for no longer than CUT_SECONDS: then, or when somebody who
takes part dies, the cut is given up. A worker that hears nothing goes on by itself after 15 s: later than the
coordinator gives a cut up, so a checkpoint never holds what was pushed after a part of it was copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from paramserver.checksum import crc32
from paramserver.coordinator.checkpoints.manifest import KeptFile, Manifest
from paramserver.coordinator.effects import DropCheckpoint, Effect, SealCheckpoint, Send, StorePiece
from paramserver.coordinator.sessions import Session
from paramserver.job import CheckpointSettings
from paramserver.process import log
from paramserver.protocol.messages import CheckpointPiece, CheckpointStored, PartReport, WorkerReport
from paramserver.protocol.pieces import Incoming
from paramserver.protocol.transport import Peer

CUT_SECONDS = 10.0  # how long training may stand still
STALL_SECONDS = 15.0  # without a piece of a file that is not whole
AGAIN_SECONDS = 10.0  # after a cut that was given up, until the job's own settings may begin another

Phase = Literal["", "gathering", "copying", "storing", "sealing"]
Owner = tuple[Literal["part", "worker"], str]
Holders = Mapping[str, tuple[str, int]]  # part -> the shard process that serves it: its name and incarnation


class _File(Incoming):
    """A file of the checkpoint on its way."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.checksum = 0


class Cuts:
    """The checkpoints of one job, at most one at a time.

    Args:
        effects: shared with the core.
        progress: what `progress` of an earlier coordinator's returned.
        first: number of the first checkpoint: a run that goes on from one counts on.
    """

    def __init__(
        self, job_id: str, settings: CheckpointSettings, effects: list[Effect], progress: Mapping[str, Any], first: int
    ) -> None:
        self.phase: Phase = ""
        self.number = 0
        """The one that is being taken; 0 where there is none."""
        self.taken: list[int] = list(progress.get("taken", []))
        self.given_up = int(progress.get("given_up", 0))
        self.reason = str(progress.get("reason", ""))
        """Why the last one was given up; empty where it was not."""
        self.pause_seconds = 0.0
        """How long training stood still for the last one."""
        self.has_changed = False
        """Whether a successor would not know all of `progress`: store it before the next order is sent."""
        self._job_id = job_id
        self._settings = settings
        self._effects = effects
        self._next = int(progress.get("next", first))
        self._is_wanted = False
        self._began = 0.0
        self._last: tuple[float, int] | None = None  # when the last one that was taken began, and the steps then
        self._steps = 0  # when the present one began
        self._moved_at = 0.0
        self._again_at = 0.0
        self._workers: dict[str, int] = {}  # who takes part: name -> incarnation
        self._owed: dict[str, int] = {}  # name -> bytes of its own, of those that have stopped
        self._parts: dict[str, tuple[str, int]] = {}
        self._files: dict[Owner, _File] = {}
        self._manifest: Manifest | None = None

    def progress(self) -> dict[str, Any]:
        """What a successor needs; the caller stores it."""
        self.has_changed = False
        return {"next": self._next, "taken": self.taken, "given_up": self.given_up, "reason": self.reason}

    # ---------------------------------------------------------------------------- what is asked

    def request(self) -> int:
        """Take one as soon as may be. Returns its number; one that is being taken is as good."""
        if self.phase in ("gathering", "copying"):
            return self.number
        self._is_wanted = True
        return self._next

    @property
    def for_workers(self) -> int:
        """What a worker's order says: stop for this one."""
        return self.number if self.phase in ("gathering", "copying") else 0

    @property
    def for_parts(self) -> int:
        """What a part's order says: copy the state for this one."""
        return self.number if self.phase in ("copying", "storing") else 0

    def figures(self) -> dict[str, Any]:
        return {
            "last": self.taken[-1] if self.taken else None,
            "taken": list(self.taken),
            "taking": self.number or None,
            "phase": self.phase,
            "given_up": self.given_up,
            "reason": self.reason,
            "pause_seconds": self.pause_seconds,
        }

    # -------------------------------------------------------------------------- how it goes on

    def advance(
        self,
        workers: Sequence[Session],
        parts: Mapping[str, PartReport],
        placed: Holders,
        steps: int,
        hindrance: str,
        make_manifest: Callable[[int], Manifest],
        now: float,
    ) -> None:
        """Move on as far as what is known allows.

        Args:
            parts: the last report of each part.
            placed: who serves each part.
            hindrance: why none can be taken now; a cut is given up for it, and files that are on their way still come
                in. Empty where all is well.
            make_manifest: the state of the coordinator itself, for the checkpoint of this number.
        """
        if self.phase in ("gathering", "copying"):
            self._advance_cut(workers, parts, placed, hindrance, make_manifest, now)
        elif self.phase == "storing":
            self._advance_storing(placed, now)
        elif not self.phase and not hindrance and self._is_due(steps, now):
            self._begin(workers, placed, steps, now)

    def _is_due(self, steps: int, now: float) -> bool:
        if self._last is None:
            self._last = now, steps
        if self._is_wanted:
            return True
        seconds, every = self._settings.every_seconds, self._settings.every_steps
        is_time = seconds is not None and now - self._last[0] >= seconds
        return now >= self._again_at and (is_time or (every is not None and steps - self._last[1] >= every))

    def _begin(self, workers: Sequence[Session], placed: Holders, steps: int, now: float) -> None:
        if not workers or not placed:
            return
        self._is_wanted = False
        self.number, self._next = self._next, self._next + 1
        self.phase, self._began, self._moved_at, self._steps = "gathering", now, now, steps
        self._workers = {worker.name: worker.incarnation for worker in workers}
        self._owed, self._files, self._manifest = {}, {}, None
        self._parts = dict(placed)
        self.has_changed = True
        log("checkpoint", job=self._job_id, number=self.number, phase=self.phase)

    def _has_stopped(self, worker: Session) -> bool:
        report = worker.report
        return isinstance(report, WorkerReport) and report.job == self._job_id and report.checkpoint == self.number

    def _advance_cut(
        self,
        workers: Sequence[Session],
        parts: Mapping[str, PartReport],
        placed: Holders,
        hindrance: str,
        make_manifest: Callable[[int], Manifest],
        now: float,
    ) -> None:
        here = {worker.name: worker.incarnation for worker in workers}
        gone = sorted(name for name, incarnation in self._workers.items() if here.get(name) != incarnation)
        running = sorted(worker.name for worker in workers if not self._has_stopped(worker))
        missing = sorted(name for name in placed if name not in parts or parts[name].checkpoint != self.number)
        if hindrance:
            self.give_up(f"{hindrance} before it was taken", now)
        elif now - self._began > CUT_SECONDS:
            late = running if self.phase == "gathering" else missing
            self.give_up(f"{', '.join(late)} did not stop and copy within {CUT_SECONDS:.0f} s", now)
        elif gone:
            self.give_up(f"{', '.join(gone)} left while it was taken", now)
        elif placed != self._parts:
            self.give_up("parts of the model moved while it was taken", now)
        elif self.phase == "gathering":
            if running:
                return
            self._workers = here
            self._owed = {worker.name: worker.report.checkpoint_bytes for worker in workers}  # type: ignore[union-attr]
            self._manifest = make_manifest(self.number)
            self.phase = "copying"
        elif running:
            self.give_up(f"{', '.join(running)} went on before all was copied", now)
        elif not missing:
            self.phase, self._moved_at = "storing", now
            self.pause_seconds = now - self._began
            log("checkpoint", job=self._job_id, number=self.number, phase=self.phase, pause=self.pause_seconds)
            self._advance_storing(placed, now)

    def _advance_storing(self, placed: Holders, now: float) -> None:
        wanted: list[Owner] = [("part", name) for name in sorted(self._parts)]
        wanted += [("worker", name) for name, size in sorted(self._owed.items()) if size]
        late = [owner for owner in wanted if owner not in self._files or not self._files[owner].is_complete]
        if late:
            # A successor would send a later state.
            moved = [name for kind, name in late if kind == "part" and placed.get(name) != self._parts[name]]
            if moved:
                self.give_up(f"{', '.join(moved)} moved before its copy was stored", now)
            elif now - self._moved_at > STALL_SECONDS:
                names = ", ".join(name for _, name in late)
                self.give_up(f"nothing came of {names} for {STALL_SECONDS:.0f} s", now)
            return
        assert self._manifest is not None  # made when all had stopped
        files = tuple(
            KeptFile(self._files[owner].name, *owner, self._files[owner].stored, self._files[owner].checksum)
            for owner in wanted
        )
        manifest = Manifest(**{**_fields(self._manifest), "files": files})
        self.phase = "sealing"
        self._effects.append(SealCheckpoint(self._job_id, self.number, manifest, self._settings.keep))

    def give_up(self, reason: str, now: float) -> None:
        """Nothing comes of the one that is being taken: training goes on, and the next one begins anew."""
        if not self.phase:
            return
        log("checkpoint-given-up", level="warning", job=self._job_id, number=self.number, reason=reason)
        if self.phase != "sealing":  # else a thread is at work there
            self._effects.append(DropCheckpoint(self._job_id, self.number))
        self.given_up += 1
        self.reason = f"checkpoint {self.number} was given up: {reason}"
        self._again_at = now + AGAIN_SECONDS
        self._end()

    def sealed(self, number: int) -> None:
        """It exists."""
        if self.phase == "sealing" and number == self.number:
            log("checkpoint", job=self._job_id, number=number, phase="taken")
            self.taken = [*self.taken, number][-self._settings.keep :]
            self.reason = ""
            self._last = self._began, self._steps
            self._end()

    def _end(self) -> None:
        self.phase, self.number = "", 0
        self._files, self._owed, self._manifest = {}, {}, None
        self.has_changed = True

    # ------------------------------------------------------------------------ what comes in

    def take(self, peer: Peer, piece: CheckpointPiece, data: memoryview, now: float) -> bool:
        """Take a piece in order; the answer says how much is stored. False where it is not the next one.

        Of a checkpoint that is not being taken any more the answer says that all is stored: the sender forgets it.
        """
        owner: Owner = ("part", piece.part) if piece.part else ("worker", piece.name)
        sender = piece.name, piece.incarnation
        is_its_own = self._parts.get(piece.part) == sender if piece.part else self._workers.get(piece.name) == sender[1]
        is_open = piece.checkpoint == self.number and self.phase in ("gathering", "copying", "storing")
        if not (is_open and is_its_own):
            self._answer(peer, piece, piece.total)
            return True
        file = self._files.get(owner)
        if file is None:
            kind = sum(known == owner[0] for known, _ in self._files)
            file = self._files[owner] = _File(f"{owner[0]}-{kind}.safetensors")
        offset = file.stored
        is_next = file.takes(piece.offset, piece.total, len(data))
        if is_next:
            file.checksum = crc32(data, file.checksum)
            self._moved_at = now
            self._effects.append(StorePiece(self._job_id, self.number, file.name, offset, data))
        self._answer(peer, piece, file.stored)
        return is_next

    def _answer(self, peer: Peer, piece: CheckpointPiece, stored: int) -> None:
        answer = CheckpointStored(job=piece.job, checkpoint=piece.checkpoint, part=piece.part, stored=stored)
        self._effects.append(Send(peer, answer))


def _fields(manifest: Manifest) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in manifest.__struct_fields__}
