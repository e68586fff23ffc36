"""All that a shard holds for one job, and how it changes: the core decides, here it is done and noted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from paramserver.encoding import Encoding, make_encoding
from paramserver.encoding.base import Bytes
from paramserver.encoding.layers import settling_encoding
from paramserver.job import Job
from paramserver.protocol.messages import BlockUpdate, PartOrder, Pull, Push
from paramserver.shard.block import HeldBlock
from paramserver.shard.consistency import make_policy
from paramserver.shard.damping import Damping
from paramserver.shard.journal.records import AnyRecord, Decision, FirstValues, Journal, Ordered
from paramserver.shard.optimizers import make_optimizer, warm_up
from paramserver.shard.publishing import make_publishing
from paramserver.shard.publishing import warm_up as warm_up_publishing
from paramserver.shard.telemetry import Telemetry

SWEEP_PEERS = 64  # from so many known connections on, gone ones are looked for whenever their number has doubled


def prepare(job: Job) -> None:
    """Compile, or load, all that serving this job calls. Takes seconds the first time; safe in another thread."""
    warm_up(make_optimizer(job.optimizer), job.push.possible_encodings())
    warm_up_publishing(job.pull, job.pull.possible_encodings())


class Serving:
    """Everything that a shard holds for one job: blocks, optimiser, policy, counters, peers, parked pulls."""

    def __init__(self, order: PartOrder) -> None:
        self.order = order
        self.job = Job.model_validate_json(order.specification)
        self.fingerprint = order.layout.fingerprint
        self.optimizer = make_optimizer(self.job.optimizer)
        self.blocks = {index: HeldBlock(order.layout.blocks[index], self.optimizer) for index in order.blocks}
        self.policy = make_policy(self.job, self._apply)
        self.damping = Damping(self.job)
        self.fp32 = make_encoding("fp32")
        self.push_encodings = self.job.push.encodings(order.layout)  # by block; a flushed residual comes in fp32
        self.settling_encodings = tuple(map(settling_encoding, self.push_encodings))  # of a model's first updates
        self.pull_encodings = self.job.pull.encodings(order.layout)
        self.publishing = make_publishing(self.job.pull, dict(enumerate(self.pull_encodings)))
        warm_up(self.optimizer, {self.fp32, *self.push_encodings, *self.settling_encodings})
        warm_up_publishing(self.job.pull, set(self.pull_encodings))
        self.telemetry = Telemetry()
        self.has_trained = False  # some worker was a member; without a coordinator nobody ever is
        self.peers: dict[bytes, tuple[str, int]] = {}  # who said Hello: (worker, incarnation)
        self.names: set[str] = set()  # of all workers that ever said Hello
        self.sweep_at = SWEEP_PEERS
        self.parked: dict[bytes, dict[int, Pull]] = {}  # by peer and request: a repeated one takes its place
        self.journal: Journal | None = None
        self.decided: list[Decision] = []  # since the last record
        self.given: deque[Decision] | None = None  # in a replay: what was decided
        self._is_last = False  # whether the update that is being absorbed is a residual at the end

    def follow(self, order: PartOrder) -> None:
        """Hold this order's blocks, for its members, under its term."""
        before, self.order = self.order, order
        for index in set(order.blocks) - self.blocks.keys():
            self.blocks[index] = HeldBlock(order.layout.blocks[index], self.optimizer)
        for index in self.blocks.keys() - set(order.blocks):
            del self.blocks[index]
            self.publishing.forget(index)
            self.policy.forget(index)
        self.has_trained = self.has_trained or bool(order.members)
        self.rest()
        self.policy.set_members([member.worker for member in order.members])
        if (order.term, order.phase, order.blocks, order.members) != (
            before.term, before.phase, before.blocks, before.members,
        ):  # fmt: skip
            self.note(Ordered(order.term, order.phase, order.blocks, order.members, self.take_decisions()))

    def rest(self) -> None:
        """Tell publishing whether training pauses or is over."""
        self.publishing.rest(self.has_trained and not self.order.members)

    def initialise(self, fresh: Sequence[tuple[HeldBlock, Bytes]]) -> None:
        """Give blocks that have none their checked first values."""
        for block, values in fresh:
            block.initialise(values)
            self.publishing.begin(block)
        if fresh:
            self.note(FirstValues(tuple([block.index for block, _ in fresh])), [values for _, values in fresh])

    def absorb(
        self,
        block: HeldBlock,
        worker: str,
        incarnation: int,
        sequence: int,
        encoding: Encoding,
        frame: Bytes,
        staleness: int,
        is_pull_slow: bool,
        is_last: bool = False,
    ) -> None:
        """Take a checked update, whose sequence is the next one, into the state.

        `is_last`: it is a residual at the end of the job. A replay need not know, for it is given the factor.
        """
        self._is_last = is_last
        self.publishing.saw_push(block, worker, is_pull_slow)
        self.policy.absorb(block, worker, encoding, frame, staleness)
        block.marks.advance(worker, incarnation, sequence)
        self.telemetry.applied(worker, block.group, encoding.identifier, staleness, frame.size, block.elements)

    def encoding_of(self, update: BlockUpdate) -> Encoding | None:
        """What the update is encoded in; None where the job does not take that."""
        encoding = self.push_encodings[update.block]
        if update.encoding == encoding.identifier:
            return encoding
        settling = self.settling_encodings[update.block]
        if update.encoding == settling.identifier:
            return settling
        return self.fp32 if update.encoding == self.fp32.identifier else None

    def taken_encodings(self, block: int) -> list[str]:
        """What a push may bring of a block: the job's encoding, that of first updates, that of flushed residuals."""
        members = (self.push_encodings[block], self.settling_encodings[block], self.fp32)
        return list(dict.fromkeys(member.identifier for member in members))

    def note(self, record: AnyRecord, frames: Sequence[Bytes] = ()) -> None:
        """Write what was decided, where the job has a journal."""
        if self.journal is not None:
            self.journal.append(record, frames)

    def take_decisions(self) -> tuple[Decision, ...]:
        """Those since the last record."""
        decided, self.decided = tuple(self.decided), []
        return decided

    def unpark(self, peer: bytes, request: Pull | Push) -> None:
        """Forget a parked pull; nothing happens where it is none."""
        parked = self.parked.get(peer, {})
        parked.pop(request.request, None)
        if not parked:
            self.parked.pop(peer, None)

    def forget(self, peer: bytes) -> None:
        """Nobody reads this connection any more."""
        del self.peers[peer]
        self.parked.pop(peer, None)

    def sweep(self, is_there: Callable[[bytes], bool]) -> None:
        """Forget the connections that are gone."""
        for peer in [peer for peer in self.peers if not is_there(peer)]:
            self.forget(peer)
        self.sweep_at = max(SWEEP_PEERS, 2 * len(self.peers))

    def _apply(self, block: HeldBlock, encoding: Encoding, frame: Bytes, staleness: int) -> None:
        given = None if self.given is None else self.given.popleft()
        if given is not None:
            lr_factor = given.lr_factor
        elif self._is_last:
            lr_factor = self.damping.last_factor(block.marks.workers)
        else:
            lr_factor = self.damping.factor(staleness, block.version)
        self.optimizer.apply(block.weights, block.state, block.version, encoding, frame, lr_factor)
        block.version += 1
        outcome = self.publishing.applied(block, self.policy.publish_period, None if given is None else given.outcome)
        if self.journal is not None:
            self.decided.append(Decision(block.index, lr_factor, outcome))
