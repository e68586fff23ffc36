"""What a pull sees: fresh weights, or the published replica that follows them in encoded deltas.

Published, a delta is encoded once, and its bytes go as they are to every worker that asks: pulling costs the
shard no arithmetic, and a worker's download does not grow with the number of workers. What an encoding loses
stays in `weights - published` and is in the next delta, so nothing drifts (error feedback for free).

A replica is published every `ceil(active pushers / 2)` updates (fresher costs bytes, staler costs loss), when a
timer says so, and hence at the end. Two pushers that say that pulls hold them up make the period one longer, so where
all do, it is as many updates as there are pushers: one delta a worker step. A block that hardly moves is held back
for some periods: it is neither encoded nor pulled meanwhile. Workers apply deltas in order, one at a time: a merged
delta would round differently, and replicas would stop being bit-identical.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from paramserver.encoding import Encoding, aligned_zeros, make_encoding
from paramserver.encoding import warm_up as warm_up_encoding
from paramserver.encoding.base import Bytes, Float32
from paramserver.encoding.coded import Coded, Moved, StepPolicy
from paramserver.encoding.coded import warm_up as warm_up_coded
from paramserver.job import PullSettings
from paramserver.protocol.buffers import BufferPool
from paramserver.protocol.transport import FrameMemory
from paramserver.shard.block import HeldBlock
from paramserver.shard.journal.records import HELD_BACK, NOT_DUE, PUBLISHED, STILL
from paramserver.shard.journal.states import Arrays, PublishingState, ReplicaState

MAX_EDITIONS = 4096  # whose versions are remembered; the staleness of an older one is counted from the oldest
MEASURE_EVERY = 64  # editions between two looks at how far a block moves: each is a pass over it
STILL_PATIENCE = 4  # times the timer's seconds that a block which hardly moves may wait
ACTIVE_ROUNDS = 8  # a worker is an active pusher while its last update is among so many of each known one's

Kind = Literal["current", "snapshot", "deltas", "weights"]


class UnknownEditionError(ValueError):
    """An edition that was never published."""


@dataclass(frozen=True, slots=True)
class Value:
    """What a puller gets of a block. `loaned` frames belong to the pool: give them back when they are sent."""

    edition: int
    kind: Kind
    encoding: str
    frames: tuple[Bytes, ...] = ()
    loaned: tuple[Bytes, ...] = ()


class Publishing(ABC):
    """What pulls see of the blocks of one job. Owned by the shard's one thread."""

    @abstractmethod
    def begin(self, block: HeldBlock) -> None:
        """A block has its first values."""

    def forget(self, index: int) -> None:  # noqa: B027  (nothing is kept by some)
        """A block is not held any more."""

    @abstractmethod
    def staleness(self, block: HeldBlock, edition: int) -> int:
        """Versions applied since that edition. Raises UnknownEditionError."""

    def saw_push(  # noqa: B027  (fresh weights count no pushers)
        self, block: HeldBlock, worker: str, is_pull_slow: bool
    ) -> None:
        """The worker pushed an update of the block, perhaps not yet applied; `is_pull_slow` as it said in its push."""

    def applied(self, block: HeldBlock, period: int | None, outcome: int | None = None) -> int:
        """The block has a new version. `period`: publish after so many; None: the number of pushers decides.

        Returns what came of it, as records.py has it; in a replay it is given and followed.
        """
        return NOT_DUE

    @abstractmethod
    def value(self, block: HeldBlock, have: int, room: int, pool: BufferPool, memory: FrameMemory | None) -> Value:
        """What is new for one that holds edition `have`, -1 for none, in at most `room` (at least 1) frames."""

    def rest(self, is_resting: bool) -> None:  # noqa: B027  (nothing is left behind by fresh weights)
        """Whether training pauses or is over: what is published now is for the time being the last."""

    def publish_due(self, now: float) -> tuple[tuple[int, int], ...]:
        """Publish what has waited for longer than the timer allows. Returns these (block, edition)."""
        return ()

    def publish(self, index: int) -> int:
        """Publish a block now, as the timer once did. Returns the edition."""
        raise ValueError("fresh weights have no editions to publish")

    def kept(self, arrays: Arrays) -> PublishingState:
        """What a restart needs; the arrays are added to `arrays`."""
        return PublishingState()

    def restore(  # noqa: B027  (fresh weights keep nothing)
        self, state: PublishingState, arrays: Arrays, blocks: Mapping[int, HeldBlock]
    ) -> None:
        """Become what was kept, of blocks that are restored already; arrays are copied."""

    def unpublished(self) -> int:
        """Blocks with updates that no edition holds yet, or only coarsely while nobody trains."""
        return 0

    def editions(self) -> int:
        """Editions published so far, over all blocks."""
        return 0

    def period(self) -> int:
        """Updates of a block between two editions, of the block with the longest period; 0: every version is one."""
        return 0

    def replica_distance(self) -> float:
        """|weights - published| / |weights| as it was last measured; 0 where they are the same thing."""
        return 0.0


def weights_of(block: HeldBlock, pool: BufferPool, memory: FrameMemory | None) -> Value:
    """The weights themselves at full precision, for an evaluation or the export. The puller's replica is then none."""
    frame = block.snapshot(_FP32, pool, memory)
    return Value(block.version, "weights", _FP32.identifier, (frame,), (frame,))


class FreshWeights(Publishing):
    """Every version is an edition; a pull encodes the weights as they are now."""

    def __init__(self, encodings: Mapping[int, Encoding]) -> None:
        self._encodings = encodings

    def begin(self, block: HeldBlock) -> None:
        pass

    def staleness(self, block: HeldBlock, edition: int) -> int:
        if edition > block.version:
            raise UnknownEditionError(f"edition {edition} does not exist, the last is {block.version}")
        return block.version - edition

    def value(self, block: HeldBlock, have: int, room: int, pool: BufferPool, memory: FrameMemory | None) -> Value:
        encoding = self._encodings[block.index]
        if have == block.version:
            return Value(have, "current", encoding.identifier)
        frame = block.snapshot(encoding, pool, memory)
        return Value(block.version, "snapshot", encoding.identifier, (frame,), (frame,))


class PublishedBlock:
    """The published replica of one block, its bounded log of deltas, and when it is due."""

    __slots__ = (
        "_first_edition", "_last_push", "_slow", "_versions", "distance", "edition", "held", "is_coarse", "is_still",
        "log", "log_bytes", "period", "since", "unseen", "values", "waiting_since",
    )  # fmt: skip

    def __init__(self, weights: Float32, version: int) -> None:
        # (elements,): what every worker at `edition` holds, bit for bit
        self.values = aligned_zeros(weights.size, place=1)
        self.values[:] = weights
        self.edition = 0
        self.log: deque[Bytes] = deque()  # the deltas that made editions edition - len(log) + 1 ... edition
        self.log_bytes = 0
        self.since = 0  # updates of this period
        self.period = 1  # updates between two editions, as it is now
        self.unseen = 0  # updates that no edition holds yet
        self.is_still = False  # it hardly moved when last measured
        self.is_coarse = False  # its last edition left what a finer step would bring
        self.held = 0  # periods in turn in which it was not published for that
        self.waiting_since: float | None = None  # when the timer first saw them
        self.distance = 0.0, 0.0  # |weights - values|^2 and |weights|^2, as last measured
        self._first_edition = 0
        self._versions = array("q", [version])  # of editions from _first_edition on
        self._last_push: dict[str, int] = {}
        self._slow: set[str] = set()  # pushers whose pulls hold them up

    def kept(self, index: int, arrays: Arrays) -> ReplicaState:
        arrays[f"{index}.published"] = self.values
        arrays[f"{index}.versions"] = np.array(self._versions, np.int64)
        return ReplicaState(
            block=index,
            edition=self.edition,
            first_edition=self._first_edition,
            since=self.since,
            unseen=self.unseen,
            is_still=self.is_still,
            held=self.held,
            last_push=dict(self._last_push),
            slow=tuple(sorted(self._slow)),
            period=self.period,
            is_coarse=self.is_coarse,
        )

    def restore(self, state: ReplicaState, arrays: Arrays) -> None:
        self.values[:] = arrays[f"{state.block}.published"]
        self._versions = array("q", arrays[f"{state.block}.versions"].tolist())
        self.edition, self._first_edition = state.edition, state.first_edition
        self.since, self.unseen = state.since, state.unseen
        self.is_still, self.held = state.is_still, state.held
        self._last_push = dict(state.last_push)
        self._slow, self.period, self.is_coarse = set(state.slow), state.period, state.is_coarse

    def version_at(self, edition: int) -> int:
        """The block's version when this edition was published; of a forgotten one, the oldest that is known."""
        if not 0 <= edition <= self.edition:
            raise UnknownEditionError(f"edition {edition} was never published, the last is {self.edition}")
        return self._versions[max(0, edition - self._first_edition)]

    def saw_push(self, worker: str, version: int, is_pull_slow: bool) -> None:
        self._last_push[worker] = version
        if is_pull_slow:
            self._slow.add(worker)
        else:
            self._slow.discard(worker)

    def follow_pushers(self, version: int) -> int:
        """The period that suits the workers that pushed this block lately; one that is gone stops counting."""
        oldest = version - ACTIVE_ROUNDS * len(self._last_push)
        for worker in [name for name, last in self._last_push.items() if last <= oldest]:
            del self._last_push[worker]
            self._slow.discard(worker)
        return max(1, math.ceil(len(self._last_push) / 2) + len(self._slow) // 2)

    def append(self, frame: Bytes, version: int, log_limit: int) -> None:
        """A new edition, made by this delta. The log keeps at most `log_limit` bytes."""
        self.edition += 1
        self.since = self.unseen = self.held = 0
        self.waiting_since = None
        self._versions.append(version)
        if len(self._versions) > MAX_EDITIONS:
            del self._versions[: MAX_EDITIONS // 2]
            self._first_edition += MAX_EDITIONS // 2
        self.log.append(frame)
        self.log_bytes += frame.size
        while self.log_bytes > log_limit:
            self.log_bytes -= self.log.popleft().size

    def deltas_since(self, have: int, room: int) -> tuple[Bytes, ...] | None:
        """Those that lead from edition `have` to the last one; None where they are not all in the log, or too many."""
        missing = self.edition - have
        if not 0 <= have <= self.edition or missing > min(len(self.log), room):
            return None
        return tuple(islice(self.log, len(self.log) - missing, None))


class PublishedDeltas(Publishing):
    """The published replica of every block.

    Args:
        encodings: of the deltas, by block.
        settings: how often a block is published, and which movement is too little.
    """

    def __init__(self, encodings: Mapping[int, Encoding], settings: PullSettings) -> None:
        self._encodings = encodings
        self._every = settings.publish_every
        self._seconds = settings.publish_seconds
        self._still = settings.still
        self._still_periods = settings.still_periods
        self._replicas: dict[int, PublishedBlock] = {}
        self._blocks: dict[int, HeldBlock] = {}
        self._delta = np.empty(0, np.float32)  # scratch of the largest block so far
        self._frame = np.empty(0, np.uint8)
        self._steps = StepPolicy()  # of `coded`: all blocks share one step
        self._measured = 0  # blocks whose distance was measured, in turn
        self._is_resting = False

    def begin(self, block: HeldBlock) -> None:
        if block.index not in self._replicas:
            self._blocks[block.index] = block
            self._replicas[block.index] = PublishedBlock(block.weights, block.version)
            if block.elements > self._delta.size:
                self._delta = np.empty(block.elements, np.float32)

    def forget(self, index: int) -> None:
        self._replicas.pop(index, None)
        self._blocks.pop(index, None)
        self._steps.forget(index)

    def replica(self, index: int) -> PublishedBlock:
        return self._replicas[index]

    def staleness(self, block: HeldBlock, edition: int) -> int:
        return block.version - self._replicas[block.index].version_at(edition)

    def saw_push(self, block: HeldBlock, worker: str, is_pull_slow: bool) -> None:
        self._replicas[block.index].saw_push(worker, block.version, is_pull_slow)

    def applied(self, block: HeldBlock, period: int | None, outcome: int | None = None) -> int:
        replica = self._replicas[block.index]
        replica.since += 1
        replica.unseen += 1
        replica.period = self._every or period or replica.follow_pushers(block.version)
        if replica.since < replica.period:
            return NOT_DUE
        if outcome is None:
            is_held = self._is_held_back(block, replica)
        else:
            # A sum of squares decided it, and such sums are not bit-identical everywhere.
            is_held, replica.is_still = bool(outcome & HELD_BACK), bool(outcome & STILL)
        if is_held:
            replica.since = 0
            replica.held += 1
        else:
            self._publish(block, replica)
        return (HELD_BACK if is_held else PUBLISHED) | (STILL if replica.is_still else 0)

    def _is_held_back(self, block: HeldBlock, replica: PublishedBlock) -> bool:
        """Whether a block that is due moves so little that it waits for another period."""
        if replica.is_still and replica.held < self._still_periods:
            return True
        # Looked at now and then, and whenever one that was held back is due at last.
        if self._still and (replica.is_still or replica.edition % MEASURE_EVERY == 0):
            moved, size = self._distance(block, replica)
            periods = replica.held + 1
            # What is not finite must go out: workers end the job that it diverged.
            replica.is_still = math.isfinite(moved) and moved <= (periods * self._still) ** 2 * size
            return replica.is_still and not replica.held
        return False

    def _publish(self, block: HeldBlock, replica: PublishedBlock, is_last: bool = False) -> None:
        """Encode what the replica lacks, and take it in exactly as every worker will."""
        encoding = self._encodings[block.index]
        # The log's own frame, never changed again: the transport may still read it long after it left the log.
        if isinstance(encoding, Coded):
            room = self._room(encoding, block)
            written = self._steps.publish(block.index, block.weights, replica.values, room, is_last)
            frame = room[:written].copy()  # it is far shorter than the room for it
            replica.is_coarse = not is_last
        else:
            frame = np.empty(encoding.frame_bytes(block.elements), np.uint8)
            scratch = self._delta[: block.elements]
            frame = frame[: encoding.encode_delta(block.weights, replica.values, frame, scratch)]
        replica.append(frame, block.version, log_limit=4 * block.elements)

    def _room(self, encoding: Encoding, block: HeldBlock) -> Bytes:
        """Scratch for the longest frame of a block."""
        size = encoding.frame_bytes(block.elements)
        if self._frame.size < size:
            self._frame = np.empty(size, np.uint8)
        return self._frame[:size]

    def value(self, block: HeldBlock, have: int, room: int, pool: BufferPool, memory: FrameMemory | None) -> Value:
        replica = self._replicas[block.index]
        identifier = self._encodings[block.index].identifier
        if have == replica.edition:
            return Value(have, "current", identifier)
        deltas = replica.deltas_since(have, room)
        if deltas is not None:
            return Value(replica.edition, "deltas", identifier, deltas)
        frame = pool.take(4 * block.elements, memory)
        frame[:] = replica.values.view(np.uint8)
        return Value(replica.edition, "snapshot", _FP32.identifier, (frame,), (frame,))

    def rest(self, is_resting: bool) -> None:
        self._is_resting = is_resting

    def publish_due(self, now: float) -> tuple[tuple[int, int], ...]:
        published = []
        for index, replica in self._replicas.items():
            if not self._is_due(replica):
                continue
            patience = STILL_PATIENCE * self._seconds if replica.is_still else self._seconds
            if replica.waiting_since is None:
                replica.waiting_since = now
            elif now - replica.waiting_since >= patience:
                published.append((index, self.publish(index)))
        return tuple(published)

    def publish(self, index: int) -> int:
        self._publish(self._blocks[index], self._replicas[index], is_last=self._is_resting)
        return self._replicas[index].edition

    def kept(self, arrays: Arrays) -> PublishingState:
        replicas = tuple(replica.kept(index, arrays) for index, replica in self._replicas.items())
        steps = tuple((index, moved.elements, moved.squares) for index, moved in self._steps.state().items())
        return PublishingState(replicas, steps)

    def restore(self, state: PublishingState, arrays: Arrays, blocks: Mapping[int, HeldBlock]) -> None:
        for replica in state.replicas:
            self.begin(blocks[replica.block])
            self._replicas[replica.block].restore(replica, arrays)
        moved = {index: Moved(elements, squares) for index, elements, squares in state.steps}
        self._steps = StepPolicy(state={**self._steps.state(), **moved})

    def _is_due(self, replica: PublishedBlock) -> bool:
        """Whether a block waits for the timer. Equal changes below half a step would never come without the last."""
        return replica.unseen > 0 or (self._is_resting and replica.is_coarse)

    def unpublished(self) -> int:
        return sum(map(self._is_due, self._replicas.values()))

    def editions(self) -> int:
        return sum(replica.edition for replica in self._replicas.values())

    def period(self) -> int:
        return max((replica.period for replica in self._replicas.values()), default=0)

    def replica_distance(self) -> float:
        self._measure()
        lag, size = (sum(replica.distance[i] for replica in self._replicas.values()) for i in (0, 1))
        return math.sqrt(lag / size) if size > 0 else 0.0

    def _measure(self, blocks: int = 8) -> None:
        """Measure some blocks' distances, others the next time: a report may not hold up the pushes."""
        indices = list(self._replicas)
        for _ in range(min(blocks, len(indices))):
            index = indices[self._measured % len(indices)]
            self._measured += 1
            replica = self._replicas[index]
            replica.distance = self._distance(self._blocks[index], replica)

    def _distance(self, block: HeldBlock, replica: PublishedBlock) -> tuple[float, float]:
        """|weights - published|^2 and |weights|^2; not finite where training has diverged."""
        with np.errstate(over="ignore", invalid="ignore"):
            delta = np.subtract(block.weights, replica.values, out=self._delta[: block.elements])
            return float(np.dot(delta, delta)), float(np.dot(block.weights, block.weights))


def warm_up(settings: PullSettings, encodings: Iterable[Encoding]) -> None:
    """Compile, or load from the disk cache, all that pulls need, so that the first edition makes nobody wait."""
    for encoding in encodings:
        if isinstance(encoding, Coded):
            warm_up_coded()
        else:
            warm_up_encoding(encoding, of_deltas=not settings.is_fresh)


_FP32 = make_encoding("fp32")


def make_publishing(settings: PullSettings, encodings: Mapping[int, Encoding]) -> Publishing:
    """What the job's pulls see; `encodings` by block."""
    if settings.is_fresh:
        return FreshWeights(encodings)
    return PublishedDeltas(encodings, settings)
