"""The coordinator's loop: one thread owns the state, the socket, the store and the run folders.

HTTP threads hand it commands through a queue and ring its doorbell; they read frozen snapshots. The loop sleeps
until a message, a ring, or the next tick.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from paramserver.coordinator.checkpoints.keeper import CheckpointKeeper
from paramserver.coordinator.checkpoints.manifest import CheckpointError
from paramserver.coordinator.checkpoints.reading import Checkpoint, find_checkpoint
from paramserver.coordinator.checkpoints.resume import resumed_from, to_document
from paramserver.coordinator.core import CoordinatorCore, EndedJobError, UnknownJobError
from paramserver.coordinator.effects import (
    AppendMetrics,
    DropCheckpoint,
    Effect,
    Happened,
    SaveJob,
    SealCheckpoint,
    SealModel,
    Send,
    SendBlock,
    SendState,
    StorePart,
    StorePiece,
    WriteResult,
)
from paramserver.coordinator.runs import RunFolder
from paramserver.coordinator.sessions import SESSION_SECONDS
from paramserver.coordinator.store import Store
from paramserver.coordinator.submission import check_submission
from paramserver.job import Job, JobError
from paramserver.process import StopRequest, log
from paramserver.protocol.messages import Refusal, Tick
from paramserver.protocol.patience import HOSTILE, IGNORE_SECONDS, Patience
from paramserver.protocol.transport import Listener, Malformed, Peer, Transport

SESSION_TICKS = 12  # looks at who is silent, in the time that a session lasts
SESSION_GAPS = 2  # so many-th part of a session between two rounds of the loop is a gap: nobody could be heard
BATCH_MESSAGES = 256  # handled in a row before commands and time get a look
SNAPSHOT_SECONDS = 1.0
COMMAND_SECONDS = 10.0  # how long HTTP waits for the loop
WEARING = HOSTILE | {"unknown-session", "wrong-job"}  # a process of ours registers again after the first of these

T = TypeVar("T")


class BusyError(Exception):
    """The loop did not answer a command in time."""


class Doorbell:
    """Wakes a loop that waits on its sockets, from any thread.

    Args:
        listening: the loop's transport.
        ringing: another one, because a transport belongs to one thread; here the lock keeps that promise.
        key: the public key of both, where they use keys.
    """

    def __init__(self, listening: Transport, ringing: Transport, key: str = "") -> None:
        self.listener: Listener = listening.listen("tcp://127.0.0.1:0")
        self._channel = ringing.connect(self.listener.address, key)
        self._lock = threading.Lock()

    def ring(self) -> None:
        with self._lock:
            # What is sent does not matter: that something came wakes the loop.
            self._channel.send(Tick(job="doorbell", worker="coordinator", incarnation=0, step=0))

    def silence(self) -> None:
        """Take in what rang; called by the loop."""
        for _ in range(BATCH_MESSAGES):
            if self.listener.receive(0) is None:
                return


class CoordinatorServer:
    """Runs a CoordinatorCore until it is told to stop.

    Args:
        transport: used by the thread that calls `run` only.
        ringing: a transport of its own for the doorbell; see Doorbell.
        listen: where processes find the coordinator. Raises TransportError where it cannot be bound.
        key: the coordinator's own public key, where the transports use keys.
        session_seconds: after so long a silence a process is given up; it sends six heartbeats in that time.
    """

    def __init__(
        self,
        transport: Transport,
        ringing: Transport,
        listen: str,
        store: Store,
        runs: RunFolder,
        data_roots: Sequence[Path] = (),
        clock: Callable[[], float] = monotonic,
        key: str = "",
        session_seconds: float = SESSION_SECONDS,
    ) -> None:
        self._transport = transport
        self._listener = transport.listen(listen)
        self._doorbell = Doorbell(transport, ringing, key)
        self._store = store
        self._runs = runs
        self._clock = clock
        self._tick_seconds, self._gap_seconds = session_seconds / SESSION_TICKS, session_seconds / SESSION_GAPS
        self.core = CoordinatorCore(clock(), store.load(), session_seconds)
        self.core.key_of = self._listener.key_of
        self._commands: queue.SimpleQueue[tuple[Callable[[], None], Callable[[], bool]]] = queue.SimpleQueue()
        self._is_closed = False
        self._patience = Patience()
        self._keeper = CheckpointKeeper(runs.root, store.document, self._checkpoint_over)
        self.commands = ServerCommands(self, list(data_roots))

    @property
    def address(self) -> str:
        return self._listener.address

    @property
    def runs_root(self) -> Path:
        return self._runs.root

    def run(self, stop: StopRequest) -> None:
        """Serve until `stop` is set. Unexpected exceptions leave here: the process ends with them."""
        last = ticked = self._clock()
        try:
            while not stop.is_set():
                until_tick = max(0.0, ticked + self._tick_seconds - self._clock())
                self._transport.wait([self._listener, self._doorbell.listener], until_tick)
                now = self._clock()
                gap = now - last
                last = now
                if gap > self._gap_seconds:
                    log("loop-gap", level="warning", seconds=gap)
                    self.core.extend(gap)
                    self._drain(now)
                else:
                    self._handle_messages(now)
                self._doorbell.silence()
                self._run_commands()
                if now - ticked >= self._tick_seconds:
                    ticked = now
                    # Not the time by now: had this process been stopped since, everybody would seem silent.
                    self._carry_out(self.core.tick(now))
            self._carry_out(self.core.part_with_members())
        finally:
            self._keeper.close()
            self._close_commands()
            self._listener.close()
            self._doorbell.listener.close()

    def _drain(self, now: float) -> None:
        """Hear everybody who spoke during the gap before anybody is judged silent."""
        deadline = self._clock() + self._gap_seconds
        while self._handle_messages(now) == BATCH_MESSAGES and self._clock() < deadline:
            pass

    def _handle_messages(self, now: float) -> int:
        """Handle what has arrived by now, up to a batch. Returns how many messages it was."""
        for handled in range(BATCH_MESSAGES):
            received = self._listener.receive(0)
            if received is None:
                return handled
            if self._patience and self._is_ignored(received.peer):
                continue
            if isinstance(received, Malformed):
                effects = self.core.malformed(received.peer, received.reason)
            else:
                effects = self.core.handle(received.peer, received.message, received.frames, now)
            self._carry_out(effects)
            for effect in effects:
                if isinstance(effect, Send) and isinstance(effect.message, Refusal) and effect.message.code in WEARING:
                    self._tire(effect.peer)
        return BATCH_MESSAGES

    def _is_ignored(self, peer: Peer) -> bool:
        if not self._patience.is_ignored(self._listener.key_of(peer).encode() or peer, self._clock()):
            return False
        self.core.counts["ignored"] += 1
        return True

    def _tire(self, peer: Peer) -> None:
        if self._patience.wears_out(self._listener.key_of(peer).encode() or peer, self._clock()):
            log("peer-ignored", level="warning", seconds=IGNORE_SECONDS, key=self._listener.key_of(peer) or "none")

    def _checkpoint_over(self, job_id: str, number: int, failure: str) -> None:
        """From any thread: the files of a checkpoint are durable, or why not."""

        def run() -> None:
            self._carry_out(self.core.checkpoint_over(job_id, number, failure, self._clock()))

        self._commands.put((run, lambda: True))
        self._doorbell.ring()

    def _run_commands(self) -> None:
        while True:
            try:
                run, _ = self._commands.get_nowait()
            except queue.Empty:
                return
            run()

    def _close_commands(self) -> None:
        """Let nobody wait for a loop that is over."""
        self._is_closed = True
        while not self._commands.empty():
            _, cancel = self._commands.get_nowait()
            cancel()

    # ------------------------------------------------------------------------------- effects

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        """Files, then facts in one transaction, then messages: nothing is promised that is not stored."""
        facts = list(effects)
        for effect in effects:
            failure = self._touch_files(effect)
            if failure is not None:
                # The failure is stored with the facts that it contradicts, or a restart would believe them.
                more = self.core.storage_failed(*failure, self._clock())
                facts += more
                for other in more:
                    if (again := self._touch_files(other)) is not None:
                        log("result-not-written", level="error", job=again[0], reason=again[1])
                break
        self._store.save(facts)
        for effect in facts:
            if isinstance(effect, Send):
                self._listener.send(effect.peer, effect.message)
            elif isinstance(effect, SendBlock | SendState):
                if (unreadable := self._keeper.send(effect, self._listener)) is not None:
                    self._carry_out(self.core.storage_failed(effect.job, unreadable, self._clock()))
            elif isinstance(effect, SaveJob):
                log("job", id=effect.record.id, state=effect.record.state, reason=effect.record.reason)
            elif isinstance(effect, Happened):
                log("happened", job=effect.job, what=effect.text)

    def _touch_files(self, effect: Effect) -> tuple[str, str] | None:
        """Carry out an effect on a run's folder. Returns (job, what went wrong) where that fails the job."""
        try:
            match effect:
                case AppendMetrics():
                    self._runs.append_metrics(effect.job, effect.figures)
                case StorePart():
                    self._runs.store_part(effect.job, effect.offset, effect.data)
                case SealModel():
                    self._runs.seal_model(effect.job)
                case WriteResult():
                    self._runs.write_result(effect.job, effect.result)
                case StorePiece() | SealCheckpoint() | DropCheckpoint():
                    self._keeper.touch(effect)
        except OSError as error:
            assert isinstance(effect, AppendMetrics | StorePart | SealModel | WriteResult)
            text = f"cannot write to {self._runs.root / effect.job}: {error}; make room or mend its permissions"
            if isinstance(effect, AppendMetrics):
                # Training is worth more than its log.
                log("metrics-not-written", level="warning", job=effect.job, reason=text)
                return None
            return effect.job, text
        return None

    # ------------------------------------------------------------------------------ commands

    def call(self, command: Callable[[], T]) -> T:
        """Run a command in the loop's thread and wait for it; from any other thread. Raises BusyError."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(command())
            except (UnknownJobError, EndedJobError, OSError) as error:
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(error)
                raise

        self._commands.put((run, future.cancel))
        self._doorbell.ring()
        if self._is_closed:
            future.cancel()
        try:
            return future.result(COMMAND_SECONDS)
        except (TimeoutError, CancelledError):
            future.cancel()
            raise BusyError("the coordinator is stopping, or overloaded: try again") from None

    def submit(
        self, job: Job, checkpoint: Checkpoint | None = None, notes: Sequence[str] = (), key: str = ""
    ) -> tuple[str, list[str]]:
        """In the loop's thread: queue a checked job, which goes on from a checkpoint. Returns its id and warnings.

        With a key that came before, nothing is queued: they are those of the job that came with it.
        """
        known = self.core.submissions.get(key)
        if known is not None:
            return known, list(self.core.jobs[known].warnings)
        specification = job.json_text()
        warnings = [*job.warnings(), *notes, *filter(None, [self.core.shortage(job.cluster)])]
        resume = None if checkpoint is None else to_document(resumed_from(checkpoint))
        job_id = self.core.unused_id(job.name, self._runs.is_taken)
        self._runs.open(job_id, specification)
        submitted = datetime.now(UTC).isoformat(timespec="seconds")
        self._carry_out(self.core.submit(job_id, specification, warnings, submitted, self._clock(), resume, key))
        return job_id, warnings

    def checkpoint(self, job_id: str) -> int:
        number, effects = self.core.checkpoint(job_id, self._clock())
        self._carry_out(effects)
        return number

    def cancel(self, job_id: str) -> None:
        self._carry_out(self.core.cancel(job_id, self._clock()))

    def shut_down(self) -> list[str]:
        """In the loop's thread: tell all members to end, workers first. Returns their names."""
        self._carry_out(self.core.shut_down(self._clock()))
        return [session.name for session in self.core.sessions.all()]

    def snapshot(self) -> dict[str, Any]:
        figures = self.core.snapshot(self._clock())
        figures["address"] = self.address
        figures["handshake_failures"] = self._listener.handshake_failures
        return figures

    def model(self, job_id: str) -> Path:
        return self._runs.model(job_id)


class ServerCommands:
    """What HTTP may do: every method may be called from any thread but the loop's."""

    def __init__(self, server: CoordinatorServer, data_roots: Sequence[Path]) -> None:
        self._server = server
        self._data_roots = data_roots
        self._snapshot: tuple[float, dict[str, Any]] | None = None

    def submit(self, text: str, resume: str | None = None, key: str = "") -> tuple[str, list[str]]:
        """Check and queue a job given as YAML or JSON. Returns its id and warnings. Raises JobError.

        `resume`: go on from a checkpoint, as `find_checkpoint` finds it: "" is the newest.
        """
        job = check_submission(text, self._data_roots)
        if resume is None:
            return self._server.call(lambda: self._server.submit(job, key=key))
        try:
            checkpoint, notes = find_checkpoint(self._server.runs_root, job, resume)
        except CheckpointError as error:
            raise JobError(f"{job.name}: cannot be resumed: {error}") from None
        return self._server.call(lambda: self._server.submit(job, checkpoint, notes, key))

    def checkpoint(self, job_id: str) -> int:
        """Ask for a checkpoint of a job that trains. Returns its number. Raises UnknownJobError, EndedJobError."""
        return self._server.call(lambda: self._server.checkpoint(job_id))

    def cancel(self, job_id: str) -> None:
        """Raises UnknownJobError, EndedJobError."""
        self._server.call(lambda: self._server.cancel(job_id))

    def shut_down(self) -> list[str]:
        """Tell all shards and workers to end, those too that nobody here has started. Returns their names."""
        return self._server.call(self._server.shut_down)

    def jobs(self) -> list[dict[str, Any]]:
        """Summaries, the newest job first."""
        core = self._server.core

        def command() -> list[dict[str, Any]]:
            newest_first = sorted(core.jobs.values(), key=lambda record: -record.number)
            return [core.job_summary(record) for record in newest_first]

        return self._server.call(command)

    def job(self, job_id: str) -> dict[str, Any]:
        """One job with its specification and, when it is over, its result. Raises UnknownJobError."""
        return self._server.call(lambda: self._server.core.job_detail(job_id))

    def model(self, job_id: str) -> Path:
        """The file of a job that is done. Raises UnknownJobError, EndedJobError (it is in another state)."""
        detail = self.job(job_id)
        if detail["state"] != "done":
            raise EndedJobError(f"job {job_id!r} is {detail['state']}: only a job that is done has a model")
        return self._server.model(job_id)

    def status(self) -> dict[str, Any]:
        """A frozen snapshot, at most about a second old: it is rendered only while somebody asks."""
        kept = self._snapshot
        if kept is None or monotonic() - kept[0] > SNAPSHOT_SECONDS:
            kept = self._snapshot = (monotonic(), self._server.call(self._server.snapshot))
        return kept[1]
