"""The hands of the coordinator's loop for checkpoints: files written and sealed, blocks and states read and sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from paramserver.coordinator.checkpoints.files import CheckpointFiles
from paramserver.coordinator.checkpoints.manifest import CheckpointError
from paramserver.coordinator.checkpoints.reading import Checkpoint, open_checkpoint
from paramserver.coordinator.effects import DropCheckpoint, SealCheckpoint, SendBlock, SendState, StorePiece
from paramserver.process import log
from paramserver.protocol.messages import KeptBlock, KeptState
from paramserver.protocol.pieces import PIECE_BYTES
from paramserver.protocol.transport import Listener


class CheckpointKeeper:
    """Belongs to the loop's thread, but for the threads that seal, which end by themselves.

    Args:
        runs: the folder of all runs.
        document: the stored document of a job by (job, kind).
        over: told from any thread (job, number, "" or why it failed).
    """

    def __init__(
        self,
        runs: Path,
        document: Callable[[str, str], Mapping[str, Any] | None],
        over: Callable[[str, int, str], None],
    ) -> None:
        self._runs = runs
        self._document = document
        self._over = over
        self._sealing: list[Thread] = []
        self._refused: tuple[str, int] | None = None  # a checkpoint of which a piece could not be written
        self._open: tuple[str, Checkpoint] | None = None  # of the job that goes on from it

    def close(self) -> None:
        """Wait for what is being made durable."""
        for thread in self._sealing:
            thread.join()

    def touch(self, effect: StorePiece | SealCheckpoint | DropCheckpoint) -> None:
        """Change the files of a checkpoint. A disk that refuses costs the checkpoint, not the job."""
        files = CheckpointFiles(self._runs / effect.job)
        match effect:
            case StorePiece():
                try:
                    files.store(effect.number, effect.file, effect.offset, effect.data)
                except OSError as error:
                    self._refused = effect.job, effect.number
                    self._over(effect.job, effect.number, _refused(files, error))
            case DropCheckpoint():
                files.drop(effect.number)
            case SealCheckpoint() if (effect.job, effect.number) == self._refused:
                pass  # its last piece came before the core had heard of that one, whose place is a hole
            case SealCheckpoint():
                self._sealing = [thread for thread in self._sealing if thread.is_alive()]
                self._sealing.append(Thread(target=self._seal, args=(files, effect), name="checkpoint"))
                self._sealing[-1].start()

    def _seal(self, files: CheckpointFiles, effect: SealCheckpoint) -> None:
        failure = ""
        try:
            files.seal(effect.number, effect.manifest, effect.keep)
        except OSError as error:
            failure = _refused(files, error)
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._over(effect.job, effect.number, failure)

    def send(self, effect: SendBlock | SendState, listener: Listener) -> str | None:
        """Send what a checkpoint holds. Returns why the job cannot go on from it; None where all is well."""
        try:
            if isinstance(effect, SendState) and not effect.worker:
                nothing = KeptState(job=effect.job, offset=0, total=0, adopted=())
                listener.send(effect.peer, nothing, [b""])
                return None
            checkpoint = self._opened(effect.job)
            if isinstance(effect, SendBlock):
                state, names, bodies = checkpoint.block(effect.block)
                kept = KeptBlock(job=effect.job, part=effect.part, block=effect.block, state=state, arrays=tuple(names))
                listener.send(effect.peer, kept, bodies)
                return None
            own = checkpoint.workers[effect.worker]
            piece = checkpoint.state(effect.worker, effect.offset, PIECE_BYTES)
            adopted = tuple([residual.block for residual in own.adopted])
            answer = KeptState(job=effect.job, offset=effect.offset, total=own.bytes, adopted=adopted)
            listener.send(effect.peer, answer, [piece])
        except (OSError, KeyError, CheckpointError) as error:
            log("checkpoint-unreadable", level="error", job=effect.job, reason=error)
            return f"the checkpoint that it goes on from cannot be read any more: {error}; submit the job again"
        return None

    def _opened(self, job: str) -> Checkpoint:
        if self._open is None or self._open[0] != job:
            document = self._document(job, "resume")
            if document is None:
                raise CheckpointError(f"job {job!r} goes on from no checkpoint")
            self._open = job, open_checkpoint(Path(document["folder"]), is_checked=True)
        return self._open[1]


def _refused(files: CheckpointFiles, error: OSError) -> str:
    return f"{files.root} cannot be written: {error.strerror or error}; make room or mend its permissions"
