"""One shard as a worker sees it: every request is answered, or sent again with the same bytes.

`ShardClient` decides and sends; it reads no clock and waits for nothing: the exchange around it receives
messages, says what time it is, and asks when the next deadline is due.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from paramserver.account import Account
from paramserver.process import log
from paramserver.protocol.messages import (
    BlockValue,
    Held,
    Hello,
    Initialised,
    Message,
    Pulled,
    Push,
    Pushed,
    Refusal,
    RefusedUpdate,
    Tick,
    Welcome,
)
from paramserver.protocol.transport import Bytes, Channel, Malformed, Received, Sending
from worker.counters import Counters
from worker.errors import JobFailure, WorkerError
from worker.request import ASKING, Request

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 2.0  # before asking again what was refused for now
LONGEST_DEADLINES = 4  # the deadline of a resent request grows up to so many times the first
LOOK_SECONDS = 1.0  # between two looks at how often the transport reconnected
SILENT_DEADLINES = 2  # so long without a word from the shard, and the connection is taken for dead

LONGEST_HELLO_SECONDS = 0.5  # between two Hellos to a shard that refuses for now: it may take the part over any moment

# Refused for now: the shard has not got its order, its blocks or our Hello yet. Ask again.
TRANSIENT = frozenset({"wrong-job", "wrong-term", "unknown-part", "not-initialised", "unknown-worker"})
# Among these, what a new Hello mends: the shard has forgotten ours, or its answer tells the term that we do not know.
GREETED_ANEW = frozenset({"wrong-job", "wrong-term", "unknown-part", "unknown-worker"})


@dataclass(frozen=True)
class Identity:
    """Who pushes, for which job and layout."""

    job: str
    worker: str
    incarnation: int
    layout: str  # fingerprint


class Sink(Protocol):
    """Who asked: told what became of each part of a request. Called from `handle`."""

    def refused_update(self, request: Request, position: int, why: RefusedUpdate) -> None:
        """An update that is refused for good: it changed nothing on the shard."""

    def renumbered(self, block: int, sequence: int) -> None:
        """An update that asked for its sequence has got it and is on its way again."""

    def acknowledged(self, block: int, version: int) -> None:
        """An update is applied; the block has this version afterwards."""

    def value(self, value: BlockValue, frames: Sequence[memoryview]) -> bool:
        """A block's value came; False where it is unusable and must be asked for again."""

    def completed(self, request: Request) -> None:
        """Every part is answered; the frames are free once the sendings are done."""


class ShardClient:
    """One channel to one shard. Used from one thread.

    Args:
        channel: connected to the shard; owned from now on.
        deadline_seconds: how long an answer may take before the same bytes are sent again.
        account: where acknowledged updates are noted, before they are forgotten.
    """

    def __init__(
        self,
        channel: Channel,
        shard: str,
        identity: Identity,
        term: int,
        deadline_seconds: float,
        counters: Counters,
        sink: Sink,
        account: Account | None = None,
    ) -> None:
        self.channel = channel
        self.shard = shard
        self.term = term
        self._identity = identity
        self._deadline = deadline_seconds
        self._counters = counters
        self._sink = sink
        self._account = account
        self._requests: dict[int, Request] = {}
        self._is_welcome = False
        self._hello_due = 0.0
        self._hello_attempts = 0
        self._silent_since: float | None = None
        self._reconnections_seen = channel.reconnections
        self._look_due = 0.0

    # ------------------------------------------------------------------ what is asked

    @property
    def requests(self) -> Sequence[Request]:
        """Those without a complete answer, oldest first."""
        return list(self._requests.values())

    @property
    def undecided(self) -> int:
        """Requests with updates or first values that have no verdict yet."""
        return sum(bool(request.undecided or request.is_unconfirmed) for request in self._requests.values())

    @property
    def in_flight(self) -> int:
        """Requests that the shard will answer without waiting for anything else: those without a held pull."""
        return sum(
            not request.is_held or bool(request.undecided) or request.is_unconfirmed
            for request in self._requests.values()
        )

    @property
    def is_settled(self) -> bool:
        return not self._requests

    def submit(self, request: Request, now: float) -> None:
        """Send a request as soon as the shard has answered our Hello."""
        self._requests[request.message.request] = request
        if self._is_welcome:
            self._transmit(request, now)
        else:
            self.poll(now)

    def tick(self, step: int) -> None:
        """Tell the worker's clock. Not answered, not repeated."""
        identity = self._identity
        self._send(Tick(job=identity.job, worker=identity.worker, incarnation=identity.incarnation, step=step))

    def move(self, channel: Channel) -> None:
        """The shard is at another address now: what is not answered is sent there, when it has answered our Hello."""
        self.channel.close()
        self.channel = channel
        for request in self._requests.values():
            request.is_held = False  # whoever held it is not asked any more
        self._is_welcome = False
        self._silent_since = None
        self._hello_attempts = 0
        self._hello_due = 0.0
        self._reconnections_seen = channel.reconnections
        self._counters.reconnections += 1

    def forget_pulls(self) -> None:
        """Wait no longer for values; updates stay until they are decided."""
        for request in self.requests:
            request.awaited.clear()
            self._finish_if_complete(request)

    def poll(self, now: float) -> float:
        """Send what is due (again). Returns when the next deadline is due, inf where nothing is awaited."""
        if now >= self._look_due:
            self._look_due = now + LOOK_SECONDS
            reconnections = self.channel.reconnections
            self._counters.reconnections += max(0, reconnections - self._reconnections_seen)
            self._reconnections_seen = reconnections
        if not self._is_welcome:
            if now >= self._hello_due:
                self._greet(now)
            return self._hello_due
        due = [request for request in self._requests.values() if now >= request.due]
        if due and self._is_silent(now):
            self._reconnect(now)
            return self._hello_due
        for request in due:
            self._counters.retries += 1
            self._transmit(request, now)
        return min((request.due for request in self._requests.values()), default=inf)

    def describe(self) -> str:
        """What is waited for, in a few words."""
        where = f"{self.shard} at {self.channel.address}"
        if not self._is_welcome:
            return f"a welcome from {where} for job {self._identity.job}"
        kinds = sorted({type(request.message).__name__.lower() for request in self._requests.values()})
        return f"{len(self._requests)} answers ({', '.join(kinds)}) from {where}"

    def close(self) -> None:
        self.channel.close()

    # ----------------------------------------------------------------- what is heard

    def handle(self, received: Received | Malformed, now: float) -> None:
        """Take one message from the shard. Late and repeated answers change nothing.

        Raises JobFailure or WorkerError where the shard refuses what cannot be mended by asking again.
        """
        self._silent_since = None
        self._counters.pull_bytes += received.message_bytes
        if isinstance(received, Malformed):
            self._counters.refusals["malformed"] += 1
            log("malformed-answer", level="warning", shard=self.shard, reason=received.reason)
            return
        match received.message:
            case Pushed() as pushed:
                self._on_pushed(pushed, received.frames, now)
            case Pulled() as pulled:
                self._on_pulled(pulled.request, pulled.values, received.frames, now)
            case Held(request=number):
                if (request := self._requests.get(number)) is not None:
                    request.is_held = True
            case Welcome(job=self._identity.job, term=term):
                self._on_welcome(term, now)
            case Initialised(request=number):
                if (request := self._requests.get(number)) is not None:
                    request.is_unconfirmed = False
                    self._finish_if_complete(request)
            case Refusal() as refusal:
                self._on_refusal(refusal, now)
            case Welcome():
                pass  # of a job that is over
            case other:
                self._counters.refusals["not-served"] += 1
                log("unexpected-answer", level="warning", shard=self.shard, message=type(other).__name__)

    def _on_welcome(self, term: int, now: float) -> None:
        if term < self.term:
            # The coordinator has told us first; what we send would be refused until it has told the shard.
            self._hello_due = now + min(self._pause_seconds(self._hello_attempts), LONGEST_HELLO_SECONDS)
            return
        self.term = term
        self._is_welcome = True
        self._hello_attempts = 0
        for request in self.requests:
            if request.attempts:
                self._counters.retries += 1
            self._transmit(request, now)

    def _on_pushed(self, pushed: Pushed, frames: tuple[memoryview, ...], now: float) -> None:
        request = self._requests.get(pushed.request)
        if request is None or not isinstance(request.message, Push):
            return
        updates = request.message.updates
        for verdict in pushed.acknowledged:
            position = request.undecided.get(verdict.block)
            if position is not None and updates[position].sequence == verdict.sequence:
                self._forget_update(request, position)
                self._sink.acknowledged(verdict.block, verdict.version)
        for refusal in pushed.refused:
            position = request.undecided.get(refusal.block)
            if position is not None and updates[position].sequence == refusal.sequence:
                self._on_refused_update(request, position, refusal, now)
        if pushed.values:
            self._on_pulled(pushed.request, pushed.values, frames, now)
        else:
            self._finish_if_complete(request)

    def _forget_update(self, request: Request, position: int) -> None:
        """An update is applied, and this worker knows it."""
        assert isinstance(request.message, Push)  # only a Push carries updates
        update = request.message.updates[position]
        if self._account is not None:
            self._account.note(update.block, request.message.step, update.sequence)
        del request.undecided[update.block]

    def _on_refused_update(self, request: Request, position: int, why: RefusedUpdate, now: float) -> None:
        self._counters.refusals[why.code] += 1
        if why.code in TRANSIENT:
            self._pause(request, now)
            return
        if why.code == "out-of-order" and why.sequence > ASKING and why.expected:
            request.renumber(position, why.expected)
            request.due = now
            self._sink.renumbered(why.block, why.expected)
            return
        if why.code == "out-of-order":
            if why.expected > why.sequence:
                self._forget_update(request, position)  # applied before: its acknowledgement was lost
                return
            raise JobFailure(
                f"{self.shard} expects update {why.expected} of block {why.block}, but those up to "
                f"{why.sequence - 1} were acknowledged: it lost acknowledged updates; submit the job again"
            )
        if why.code == "old-incarnation":
            raise self._superseded(why.detail)
        del request.undecided[why.block]
        request.has_final_refusals = True
        log("update-refused", level="warning", shard=self.shard, block=why.block, code=why.code, detail=why.detail)
        self._sink.refused_update(request, position, why)

    def _on_pulled(self, number: int, values: Sequence[BlockValue], frames: tuple[memoryview, ...], now: float) -> None:
        request = self._requests.get(number)
        if request is None:
            return
        position = 0
        for value in values:
            own = frames[position : position + value.frames]
            position += value.frames
            if value.block in request.awaited and self._sink.value(value, own):
                request.awaited.discard(value.block)
        request.is_held = False
        if request.awaited:
            self._pause(request, now)  # an unusable value: ask for it again
        self._finish_if_complete(request)

    def _on_refusal(self, refusal: Refusal, now: float) -> None:
        self._counters.refusals[refusal.code] += 1
        code, request = refusal.code, self._requests.get(refusal.request)
        if code == "old-incarnation":
            raise self._superseded(refusal.detail)
        if code == "wrong-version":
            raise WorkerError(f"{self.shard}: {refusal.detail}; start workers and shards of the same release")
        if code == "wrong-layout":
            raise JobFailure(f"{self.shard}: {refusal.detail}; the workers and the job disagree about the model")
        if code == "unknown-worker" and self._is_welcome:
            self._is_welcome = False
            self._hello_due = now
        elif not self._is_welcome:
            self._hello_due = now + min(self._pause_seconds(self._hello_attempts), LONGEST_HELLO_SECONDS)
        elif request is None:
            # Bytes that were damaged on their way, or a late answer: the deadline sends again what is awaited.
            log("refused", level="warning", shard=self.shard, code=code, detail=refusal.detail)
        elif code in TRANSIENT:
            if code in GREETED_ANEW:
                self._is_welcome = False
                self._hello_due = now + FIRST_PAUSE_SECONDS
            self._pause(request, now)
        else:
            raise JobFailure(f"{self.shard} refuses a {type(request.message).__name__} ({code}): {refusal.detail}")

    # ------------------------------------------------------------------- what is sent

    def _greet(self, now: float) -> None:
        identity = self._identity
        if self._hello_attempts >= SILENT_DEADLINES and self._is_silent(now):
            self.channel.reset()
            self._silent_since = now
        self._send(
            Hello(
                worker=identity.worker,
                incarnation=identity.incarnation,
                job=identity.job,
                layout=identity.layout,
                part=self.shard,
            )
        )
        self._silent_since = now if self._silent_since is None else self._silent_since
        self._hello_attempts += 1
        self._hello_due = now + min(self._deadline, LONGEST_PAUSE_SECONDS)

    def _transmit(self, request: Request, now: float) -> None:
        message, frames = request.as_sent(self.term)
        request.sendings = [sending for sending in request.sendings if not sending.done]
        request.sendings.append(self._send(message, frames))
        request.due = now + self._deadline * min(2**request.attempts, LONGEST_DEADLINES)
        request.attempts += 1
        self._silent_since = now if self._silent_since is None else self._silent_since

    def _send(self, message: Message, frames: Sequence[Bytes] = ()) -> Sending:
        before = self.channel.sent_bytes
        sending = self.channel.send(message, [frame.data for frame in frames])
        self._counters.push_bytes += self.channel.sent_bytes - before
        return sending

    # ---------------------------------------------------------------------- patience

    def _finish_if_complete(self, request: Request) -> None:
        if request.is_complete and self._requests.pop(request.message.request, None) is not None:
            self._sink.completed(request)

    def _pause(self, request: Request, now: float) -> None:
        request.due = now + self._pause_seconds(request.attempts)

    @staticmethod
    def _pause_seconds(attempts: int) -> float:
        return float(min(FIRST_PAUSE_SECONDS * 2 ** min(attempts, 10), LONGEST_PAUSE_SECONDS))

    def _is_silent(self, now: float) -> bool:
        return self._silent_since is not None and now - self._silent_since >= SILENT_DEADLINES * self._deadline

    def _reconnect(self, now: float) -> None:
        log("shard-silent", level="warning", shard=self.shard, awaited=self.describe(), action="connect anew")
        self.channel.reset()
        self._counters.reconnections += 1
        self._reconnections_seen = self.channel.reconnections
        self._is_welcome = False
        self._silent_since = None
        self._hello_attempts = 0
        self._greet(now)

    def _superseded(self, detail: str) -> WorkerError:
        return WorkerError(
            f"{self.shard}: {detail}; a newer process carries the name {self._identity.worker!r}, this one ends"
        )
