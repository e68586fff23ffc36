"""What a shard decides. This file knows no socket, clock or file.

`take_order` says what to serve, `handle` takes one message and returns the replies. Whatever a peer sends
is either done or refused by name, counted, and changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from paramserver.encoding import Encoding, EncodingError
from paramserver.encoding.base import Bytes
from paramserver.protocol.buffers import BufferPool
from paramserver.protocol.framing import MAX_FRAMES
from paramserver.protocol.messages import (
    PROTOCOL_VERSION,
    Acknowledged,
    BlockUpdate,
    BlockValue,
    Held,
    Hello,
    Initialise,
    Initialised,
    Message,
    PartOrder,
    Pull,
    Pulled,
    Push,
    Pushed,
    Refusal,
    RefusalCode,
    RefusedUpdate,
    Tick,
    Welcome,
    WorkerKey,
)
from paramserver.protocol.transport import MAX_MESSAGE_BYTES, FrameMemory
from paramserver.shard.block import HeldBlock
from paramserver.shard.journal.records import (
    Greeted,
    Published,
    Ticked,
    pushed,
)
from paramserver.shard.publishing import UnknownEditionError, weights_of
from paramserver.shard.serving import Serving
from paramserver.shard.watermarks import Verdict

MAX_PEERS = 65536
MAX_PARKED = 4096  # held pulls a peer; a worker has a few messages a step
PARKED_ROUNDS = 4  # and so many times all blocks: a worker wants each once a step
MAX_WORKERS = 8192  # names that a job's state may hold, those of dead workers too
MAX_ANSWER_BYTES = MAX_MESSAGE_BYTES - 2**20  # what is left is for the head


@dataclass(frozen=True, slots=True)
class Reply:
    """A message for a peer. `loaned` are those of its frames that the pool wants back when they are sent."""

    peer: bytes
    message: Message
    frames: Sequence[Bytes] = ()
    loaned: Sequence[Bytes] = ()


# Of an answer: what is told of each block, the frames of all, and those that the pool lends.
Values = tuple[Sequence[BlockValue], Sequence[Bytes], Sequence[Bytes]]
_NO_VALUES: Values = ((), (), ())


class Refused(Exception):  # noqa: N818  (a verdict on the peer's message, not an error of ours)
    """A request, or one of its updates, is refused by name."""

    def __init__(self, code: RefusalCode, detail: str, expected: int = 0) -> None:
        super().__init__(detail)
        self.code: RefusalCode = code
        self.detail = detail
        self.expected = expected


def _pull_of(request: Pull | Push) -> Pull:
    """What is left of a request once its updates are decided: these need not wait, nor take room."""
    if isinstance(request, Pull):
        return request
    return Pull(
        request=request.request,
        job=request.job,
        term=request.term,
        phase=request.phase,
        worker=request.worker,
        incarnation=request.incarnation,
        step=request.step,
        wants=request.wants,
    )


@dataclass
class ShardCore:
    """One part of a shard, by its name. Not thread-safe: one thread owns it."""

    name: str
    serving: Serving | None = None
    refusals: Counter[str] = field(default_factory=Counter)
    pool: BufferPool = field(default_factory=BufferPool)
    memory: Callable[[bytes], FrameMemory | None] = lambda peer: None  # where frames to a peer are best written
    is_there: Callable[[bytes], bool] = lambda peer: True  # whether a peer is still connected
    key_of: Callable[[bytes], str] = lambda peer: ""  # what a peer has proven to hold; empty where keys are not used

    # ------------------------------------------------------------------ what to serve

    def take_order(self, order: PartOrder | None) -> list[Reply]:
        """Become what the coordinator says: take up a job, learn its members, or drop everything.

        An order with an older term than the one served is ignored.
        """
        serving = self.serving
        if order is None:
            self.serving = None
            return []
        if serving is None or serving.order.job != order.job:
            serving = Serving(order)
            if serving.job.durability.log != "none":
                raise ValueError(f"job {order.job!r} wants a journal: open it, then let the core `adopt` what it holds")
            self.adopt(serving)
        elif order.term < serving.order.term:
            return []
        serving.follow(order)
        return self._release(serving)

    def adopt(self, serving: Serving) -> None:
        """Take up a job with what its journal holds of it; `take_order` then goes on from there."""
        self.refusals.clear()
        self.serving = serving

    def publish_due(self, now: float) -> int:
        """Publish what has waited too long. Returns how many blocks have updates that no edition holds yet."""
        if self.serving is None:
            return 0
        published = self.serving.publishing.publish_due(now)
        if published:
            self.serving.note(Published(published))
        return self.serving.publishing.unpublished()

    # ------------------------------------------------------------------- the hot path

    def handle(self, peer: bytes, message: Message, frames: Sequence[memoryview]) -> list[Reply]:
        """One message of the data plane. `frames` are only read, and only during the call."""
        try:
            match message:
                case Push():
                    return self._push(peer, message, frames)
                case Pull():
                    serving = self._admit(peer, message)
                    self._count_step(serving, message)
                    released = self._release(serving)
                    return [*released, *self._answer_pull(serving, peer, message, self._wanted(serving, peer, message))]
                case Tick():
                    return self._tick(peer, message)
                case Hello():
                    return [self._hello(peer, message)]
                case Initialise():
                    return [self._initialise(peer, message, frames)]
                case _:
                    raise Refused("not-served", f"a shard takes no {type(message).__name__}")
        except Refused as refused:
            return [self.refuse(peer, refused.code, refused.detail, getattr(message, "request", 0))]

    def _push(self, peer: bytes, push: Push, frames: Sequence[memoryview]) -> list[Reply]:
        serving = self._admit(peer, push)
        wanted = self._wanted(serving, peer, push)  # before anything changes: a refused message must change nothing
        acknowledged: list[Acknowledged] = []
        refused: list[RefusedUpdate] = []
        taken: list[tuple[BlockUpdate, Bytes]] = []
        for update, buffer in zip(push.updates, frames, strict=True):
            frame = np.frombuffer(buffer, np.uint8)
            try:
                acknowledged.append(self._update(serving, push, update, frame))
                if not acknowledged[-1].duplicate:
                    taken.append((update, frame))
            except Refused as why:
                self.refusals[why.code] += 1
                refused.append(RefusedUpdate(update.block, update.sequence, why.code, why.detail, why.expected))
        serving.telemetry.pushes += 1
        if taken and serving.journal is not None:
            serving.policy.tick(push.worker, push.step)
            serving.note(pushed(push, taken, serving.take_decisions()), [frame for _, frame in taken])
        else:
            self._count_step(serving, push)
        found = self._values(serving, peer, push, wanted) if push.wants else _NO_VALUES
        values, bodies, loaned = found or _NO_VALUES
        verdicts = Pushed(
            request=push.request, acknowledged=tuple(acknowledged), refused=tuple(refused), values=tuple(values)
        )
        replies = [Reply(peer, verdicts, bodies, loaned)]
        if found is None:
            replies.append(Reply(peer, Held(request=push.request)))
        # After the pusher's own pull: those who waited for this push are more stale already.
        return replies + self._release(serving)

    def _update(self, serving: Serving, push: Push, update: BlockUpdate, frame: Bytes) -> Acknowledged:
        """Apply one block's update at most once. Raises Refused, and then nothing has changed."""
        block = self._block(serving, update.block)
        verdict = block.marks.judge(push.worker, push.incarnation, update.sequence)
        if verdict is Verdict.DUPLICATE:
            serving.telemetry.duplicates += 1
            return Acknowledged(update.block, update.sequence, block.version, duplicate=True)
        if verdict is Verdict.GAP:
            expected = block.marks.expected(push.worker, push.incarnation)
            detail = f"block {update.block}: found sequence {update.sequence}, expected {expected}"
            raise Refused("out-of-order", detail, expected)
        if verdict is Verdict.OLD:
            raise Refused("old-incarnation", f"{push.worker} has a newer incarnation than {push.incarnation}")
        encoding = self._encoding_of(serving, update)
        try:
            staleness = serving.publishing.staleness(block, update.edition)
            encoding.check(frame, block.elements)
        except UnknownEditionError as error:
            raise Refused("unknown-edition", f"block {update.block}: {error}") from None
        except EncodingError as error:
            raise Refused(error.code, f"block {update.block}: {error}") from None
        source = (push.worker, push.incarnation, update.sequence)
        serving.absorb(block, *source, encoding, frame, staleness, push.is_pull_slow, push.is_last)
        return Acknowledged(update.block, update.sequence, block.version)

    @staticmethod
    def _encoding_of(serving: Serving, update: BlockUpdate) -> Encoding:
        encoding = serving.encoding_of(update)
        if encoding is None:
            taken = " or ".join(serving.taken_encodings(update.block))
            detail = f"block {update.block}: found {update.encoding!r}, this job takes {taken}"
            raise Refused("unknown-encoding", detail)
        return encoding

    def _answer_pull(
        self, serving: Serving, peer: bytes, request: Pull | Push, blocks: Sequence[HeldBlock]
    ) -> list[Reply]:
        """The values of the blocks that a pull wants, or nothing yet where the policy makes it wait."""
        found = self._values(serving, peer, request, blocks)
        if found is None:
            return [Reply(peer, Held(request=request.request))]
        values, frames, loaned = found
        return [Reply(peer, Pulled(request=request.request, values=tuple(values)), frames, loaned)]

    def _values(
        self, serving: Serving, peer: bytes, request: Pull | Push, blocks: Sequence[HeldBlock]
    ) -> Values | None:
        """What a request wants of these blocks; None, and the request is parked, where the policy makes it wait."""
        if not serving.policy.may_pull(request.worker, (block.index for block in blocks)):
            serving.parked.setdefault(peer, {})[request.request] = _pull_of(request)
            return None
        serving.unpark(peer, request)
        serving.telemetry.pulls += 1
        values: list[BlockValue] = []
        frames: list[Bytes] = []
        loaned: list[Bytes] = []
        wants_weights = isinstance(request, Pull) and request.source == "weights"
        memory, room = self.memory(peer), MAX_FRAMES - len(blocks)  # each block may need a frame
        for block, want in zip(blocks, request.wants, strict=True):
            if wants_weights:
                value = weights_of(block, self.pool, memory)
            else:
                value = serving.publishing.value(block, want.have, room + 1, self.pool, memory)
                room -= max(0, len(value.frames) - 1)
            payload_bytes = sum(frame.size for frame in value.frames)
            usual = serving.pull_encodings[block.index].identifier if not wants_weights else value.encoding
            is_behind = value.kind == "snapshot" and value.encoding != usual
            serving.telemetry.pulled(block.group, usual, payload_bytes, block.elements, is_behind)
            values.append(BlockValue(block.index, value.edition, value.kind, value.encoding, len(value.frames)))
            frames += value.frames
            loaned += value.loaned
        return values, frames, loaned

    def _wanted(self, serving: Serving, peer: bytes, request: Pull | Push) -> list[HeldBlock]:
        """The blocks that a request wants. Raises Refused where one is not here or the answer fits no message."""
        blocks = [self._block(serving, want.block) for want in request.wants]
        # A snapshot, and what the log of deltas holds at most.
        answer_bytes = sum(4 * block.elements for block in blocks)
        if answer_bytes > MAX_ANSWER_BYTES:
            detail = f"the answer would have {answer_bytes} bytes, allowed are {MAX_ANSWER_BYTES}; ask for fewer blocks"
            raise Refused("malformed", detail)
        parked = serving.parked.get(peer, {})
        if parked and request.request not in parked:
            wanted = len(blocks) + sum(len(other.wants) for other in parked.values())
            if len(parked) >= MAX_PARKED or wanted > PARKED_ROUNDS * len(serving.blocks):
                detail = f"{len(parked)} pulls of {request.worker} wait already, and this is beyond the limit"
                raise Refused("not-served", detail)
        return blocks

    def _release(self, serving: Serving) -> list[Reply]:
        """Answer the parked pulls that need wait no longer."""
        replies: list[Reply] = []
        for peer, parked in list(serving.parked.items()):
            for request in list(parked.values()):
                answers = self._answer_pull(serving, peer, request, self._wanted(serving, peer, request))
                if request.request not in parked:
                    replies += answers
        return replies

    # --------------------------------------------------------------------- the others

    def _tick(self, peer: bytes, tick: Tick) -> list[Reply]:
        serving = self.serving
        # A tick is not answered, so what is refused is only counted.
        if serving is None or serving.order.job != tick.job:
            self.refusals["wrong-job"] += 1
            return []
        if serving.peers.get(peer) != (tick.worker, tick.incarnation):
            self.refusals["unknown-worker"] += 1
            return []
        self._count_step(serving, tick)
        return self._release(serving)

    @staticmethod
    def _count_step(serving: Serving, message: Push | Pull | Tick) -> None:
        if serving.policy.tick(message.worker, message.step):
            serving.note(Ticked(message.worker, message.step))

    def _hello(self, peer: bytes, hello: Hello) -> Reply:
        serving = self._serving(hello.job)
        if hello.version != PROTOCOL_VERSION:
            raise Refused(
                "wrong-version", f"found protocol version {hello.version}, this shard speaks {PROTOCOL_VERSION}"
            )
        if hello.layout != serving.fingerprint:
            raise Refused("wrong-layout", f"found layout {hello.layout}, this job has {serving.fingerprint}")
        key = self.key_of(peer)
        if key and WorkerKey(hello.worker, hello.incarnation, key) not in serving.order.workers:
            # Also a worker of which the coordinator has not told us yet: it says Hello again.
            detail = f"the coordinator knows no live worker {hello.worker!r} of incarnation {hello.incarnation} and key"
            raise Refused("wrong-key", f"{detail} {key}")
        for known, (worker, incarnation) in list(serving.peers.items()):
            if worker != hello.worker:
                continue
            if incarnation > hello.incarnation:
                raise Refused("old-incarnation", f"{worker} is here with incarnation {incarnation}")
            serving.forget(known)  # it connected anew
        if len(serving.peers) >= min(serving.sweep_at, MAX_PEERS):
            serving.sweep(self.is_there)
        if len(serving.peers) >= MAX_PEERS:
            raise Refused("not-served", f"this shard knows {MAX_PEERS} workers already, which is its limit")
        if hello.worker not in serving.names and len(serving.names) >= MAX_WORKERS:
            raise Refused("not-served", f"this job has had {MAX_WORKERS} workers already, which is the limit")
        serving.names.add(hello.worker)
        serving.peers[peer] = (hello.worker, hello.incarnation)
        if serving.policy.greeted(hello.worker):
            serving.note(Greeted(hello.worker))
        return Reply(peer, Welcome(part=self.name, job=hello.job, term=serving.order.term))

    def _initialise(self, peer: bytes, message: Initialise, frames: Sequence[memoryview]) -> Reply:
        serving = self._serving(message.job)
        self._check_term(serving, message.term)
        if self.key_of(peer) and peer not in serving.peers:
            raise Refused("unknown-worker", "no Hello came through this connection; say it first")
        if message.layout != serving.fingerprint:
            raise Refused("wrong-layout", f"found layout {message.layout}, this job has {serving.fingerprint}")
        checked: list[tuple[HeldBlock, Bytes]] = []
        for index, frame in zip(message.blocks, frames, strict=True):
            block, values = self._block(serving, index, must_have_value=False), np.frombuffer(frame, np.uint8)
            try:
                serving.fp32.check(values, block.elements)
            except EncodingError as error:
                raise Refused(error.code, f"block {index}: {error}") from None
            checked.append((block, values))
        fresh = [(block, values) for block, values in checked if not block.is_initialised]
        for block, values in checked:
            if block.is_initialised and not block.initialise(values):
                raise Refused("already-initialised", f"block {block.index} was given other first values before")
        serving.initialise(fresh)
        return Reply(peer, Initialised(request=message.request))

    # -------------------------------------------------------------------- admission

    def _serving(self, job: str) -> Serving:
        if self.serving is None:
            raise Refused("wrong-job", f"found job {job!r}, this shard serves none")
        if self.serving.order.job != job:
            raise Refused("wrong-job", f"found job {job!r}, this shard serves {self.serving.order.job!r}")
        return self.serving

    def _admit(self, peer: bytes, message: Push | Pull) -> Serving:
        serving = self._serving(message.job)
        self._check_term(serving, message.term)
        if serving.peers.get(peer) != (message.worker, message.incarnation):
            raise Refused(
                "unknown-worker", f"no Hello from {message.worker} came through this connection; say it first"
            )
        return serving

    def _check_term(self, serving: Serving, term: int) -> None:
        if term != serving.order.term:
            raise Refused("wrong-term", f"found placement term {term}, this shard serves {serving.order.term}")

    def _block(self, serving: Serving, index: int, must_have_value: bool = True) -> HeldBlock:
        block = serving.blocks.get(index)
        if block is None:
            raise Refused("unknown-block", f"block {index} is not placed on {self.name}")
        if must_have_value and not block.is_initialised:
            raise Refused("not-initialised", f"block {index} has no value yet; try again when it has")
        return block

    def refuse(self, peer: bytes, code: RefusalCode, detail: str, request: int = 0) -> Reply:
        """Count a refusal and make its reply."""
        self.refusals[code] += 1
        return Reply(peer, Refusal(request=request, code=code, detail=detail))
