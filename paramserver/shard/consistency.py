"""Consistency as policy objects: when an update is applied, and when a pull must wait.

Adding a mode touches this file only: write a Policy and list it in `POLICIES`. The core hands every
admitted update to `absorb` and asks `may_pull` before it answers; it knows no mode by name.

Sources: bounded = stale synchronous parallel (Ho et al., NIPS 2013); sync with n of m = backup workers
(Chen et al., arXiv 1604.00981), except that a late push is not thrown away: it joins the open round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import ClassVar

import numpy as np
from msgspec import structs

from paramserver.encoding import Encoding, make_encoding
from paramserver.encoding.base import Bytes, Float32
from paramserver.job import Job
from paramserver.shard.block import HeldBlock
from paramserver.shard.journal.states import Arrays, PolicyState, RoundState
from paramserver.shard.optimizers import decode_add

# Applies a checked frame to a block; staleness in versions (for damping).
Apply = Callable[[HeldBlock, Encoding, Bytes, int], None]


class Policy(ABC):
    """One mode. `members` are the workers that hold a lease; others hold nobody up."""

    mode: ClassVar[str]

    def __init__(self, job: Job, apply: Apply) -> None:
        self.members: frozenset[str] = frozenset()
        self._apply = apply

    def set_members(self, members: Collection[str]) -> None:
        """The workers that count from now on. May release pulls and complete rounds."""
        self.members = frozenset(members)

    def tick(self, worker: str, step: int) -> bool:
        """A worker has finished `step` steps. Returns whether that is news; most modes keep no clock."""
        return False

    def greeted(self, worker: str) -> bool:
        """A worker says Hello: it may count its steps from the start again. Returns whether that is news."""
        return False

    @abstractmethod
    def absorb(self, block: HeldBlock, worker: str, encoding: Encoding, frame: Bytes, staleness: int) -> None:
        """Take a checked update into the state. It is acknowledged when this returns."""

    @abstractmethod
    def may_pull(self, worker: str, blocks: Iterable[int]) -> bool:
        """Whether the worker may have these blocks now; otherwise its pull is parked and asked about again."""

    def forget(self, index: int) -> None:  # noqa: B027  (most modes hold nothing back)
        """A block is not held any more."""

    def kept(self, arrays: Arrays) -> PolicyState:
        """What a restart needs; the arrays themselves, not copies, are added to `arrays`."""
        return PolicyState(members=tuple(sorted(self.members)))

    def restore(self, state: PolicyState, arrays: Arrays, blocks: Mapping[int, HeldBlock]) -> None:
        """Become what was kept; arrays are copied."""
        self.members = frozenset(state.members)

    def restore_round(  # noqa: B027  (most modes hold nothing back)
        self, kept: RoundState, arrays: Arrays, blocks: Mapping[int, HeldBlock]
    ) -> None:
        """Hold a block's open round as it was kept; arrays are copied."""

    @property
    def pending_updates(self) -> int:
        """Updates that are acknowledged and not yet in the weights."""
        return 0

    @property
    def publish_period(self) -> int | None:
        """Versions between two editions of a published replica; None where the number of pushers decides."""
        return None


class AsyncPolicy(Policy):
    """Every update at once, every pull at once."""

    mode = "async"

    def absorb(self, block: HeldBlock, worker: str, encoding: Encoding, frame: Bytes, staleness: int) -> None:
        self._apply(block, encoding, frame, staleness)

    def may_pull(self, worker: str, blocks: Iterable[int]) -> bool:
        return True


class BoundedPolicy(AsyncPolicy):
    """A worker may be at most `slack` steps ahead of the slowest member.

    Clocks are relative: a worker that becomes a member starts at the slowest member's clock, whatever
    its own count of steps, so that neither a joiner nor one that had no lease for a while stops the rest.
    """

    mode = "bounded"

    def __init__(self, job: Job, apply: Apply) -> None:
        super().__init__(job, apply)
        assert job.consistency.slack is not None  # the job specification holds it
        self._slack = job.consistency.slack
        self._steps: dict[str, int] = {}  # as the worker counts
        self._offsets: dict[str, int] = {}  # what makes its count comparable
        self._greeted: set[str] = set()  # those that have not ticked since their last Hello

    def set_members(self, members: Collection[str]) -> None:
        slowest = self._slowest()
        for worker in set(members) - self.members:
            self._offsets[worker] = slowest - self._steps.get(worker, 0)
        super().set_members(members)
        for worker in self._offsets.keys() - self.members:
            # What a worker without a lease last counted is kept: it is where its next offset starts.
            del self._offsets[worker]

    def tick(self, worker: str, step: int) -> bool:
        known = self._steps.get(worker)
        if known is not None and step < known and worker not in self._greeted:
            return False  # said before, and overtaken on its way
        if known is not None and step < known and worker in self._offsets:
            self._offsets[worker] += known - step  # it counts from 0 again and stands where it stood
        is_news = step != known or worker in self._greeted
        self._greeted.discard(worker)
        self._steps[worker] = step
        return is_news

    def greeted(self, worker: str) -> bool:
        is_news = worker not in self._greeted
        self._greeted.add(worker)
        return is_news

    def may_pull(self, worker: str, blocks: Iterable[int]) -> bool:
        return worker not in self.members or self._clock(worker) - self._slowest() <= self._slack

    def kept(self, arrays: Arrays) -> PolicyState:
        clocks = {"steps": dict(self._steps), "offsets": dict(self._offsets), "greeted": tuple(sorted(self._greeted))}
        return structs.replace(super().kept(arrays), **clocks)

    def restore(self, state: PolicyState, arrays: Arrays, blocks: Mapping[int, HeldBlock]) -> None:
        super().restore(state, arrays, blocks)
        self._steps, self._offsets, self._greeted = dict(state.steps), dict(state.offsets), set(state.greeted)

    def _clock(self, worker: str) -> int:
        return self._steps.get(worker, 0) + self._offsets[worker]

    def _slowest(self) -> int:
        return min((self._clock(worker) for worker in self.members), default=0)


class _Round:
    """The open round of one block: the sum of the updates that it holds, whose they are, and who waits for it."""

    __slots__ = ("contributors", "staleness", "total", "updates", "waiting")

    def __init__(self, elements: int) -> None:
        self.total: Float32 = np.zeros(elements, np.float32)  # (elements,)
        self.contributors: set[str] = set()
        self.waiting: set[str] = set()
        self.updates = 0
        self.staleness = 0


class SyncPolicy(Policy):
    """A block's round closes when `quorum` members (all, where none is given) have pushed: the mean is applied once.

    A contributor's pull waits for the round. A late push joins the round in progress, so an acknowledged
    update is never thrown away; its worker does not wait for that round, since its own is over. Else workers that were
    late at different blocks would wait for each other. When the last member leaves, open rounds are applied.
    """

    mode = "sync"

    def __init__(self, job: Job, apply: Apply) -> None:
        super().__init__(job, apply)
        self._wanted = job.consistency.quorum
        self._quorum = self._wanted or job.cluster.workers
        self._rounds: dict[int, tuple[HeldBlock, _Round]] = {}
        self._closed: dict[int, int] = {}  # rounds of a block so far
        self._turns: dict[tuple[int, str], int] = {}  # of a block and member: the round that its next push is for
        self._fp32 = make_encoding("fp32")
        self._is_draining = False

    def set_members(self, members: Collection[str]) -> None:
        had_members = bool(self.members)
        joined = set(members) - self.members
        super().set_members(members)
        self._turns = {key: turn for key, turn in self._turns.items() if key[1] in self.members}
        self._turns |= {(index, worker): closed for index, closed in self._closed.items() for worker in joined}
        if self.members:
            self._quorum = min(self._wanted or len(self.members), len(self.members))
            self._is_draining = False
        elif had_members:
            # Nobody is left to fill a round. What still comes are residuals: a share of the last rounds' mean.
            self._is_draining = True
        for block, open_round in list(self._rounds.values()):
            self._close_if_full(block, open_round)

    def absorb(self, block: HeldBlock, worker: str, encoding: Encoding, frame: Bytes, staleness: int) -> None:
        _, open_round = self._rounds.setdefault(block.index, (block, _Round(block.elements)))
        decode_add(encoding, frame, open_round.total)
        open_round.contributors.add(worker)
        now = self._closed.get(block.index, 0)
        is_member = worker in self.members
        turn = min(self._turns.get((block.index, worker), 0 if is_member else now), now)
        if turn == now:
            open_round.waiting.add(worker)
        if is_member:
            self._turns[block.index, worker] = turn + 1
        open_round.updates += 1
        open_round.staleness = max(open_round.staleness, staleness)
        self._close_if_full(block, open_round)

    def may_pull(self, worker: str, blocks: Iterable[int]) -> bool:
        return not any(block in self._rounds and worker in self._rounds[block][1].waiting for block in blocks)

    def forget(self, index: int) -> None:
        self._rounds.pop(index, None)
        self._closed.pop(index, None)
        self._turns = {key: turn for key, turn in self._turns.items() if key[0] != index}

    def kept(self, arrays: Arrays) -> PolicyState:
        rounds = []
        for index, (_, held) in sorted(self._rounds.items()):
            arrays[f"{index}.round"] = held.total
            contributors, waiting = tuple(sorted(held.contributors)), tuple(sorted(held.waiting))
            rounds.append(RoundState(index, contributors, held.updates, held.staleness, waiting))
        return structs.replace(
            super().kept(arrays),
            quorum=self._quorum,
            is_draining=self._is_draining,
            rounds=tuple(rounds),
            closed=tuple(sorted(self._closed.items())),
            turns=tuple(sorted((block, worker, turn) for (block, worker), turn in self._turns.items())),
        )

    def restore(self, state: PolicyState, arrays: Arrays, blocks: Mapping[int, HeldBlock]) -> None:
        super().restore(state, arrays, blocks)
        self._quorum, self._is_draining = state.quorum, state.is_draining
        self._closed = dict(state.closed)
        self._turns = {(block, worker): turn for block, worker, turn in state.turns}
        for kept in state.rounds:
            self.restore_round(kept, arrays, blocks)

    def restore_round(self, kept: RoundState, arrays: Arrays, blocks: Mapping[int, HeldBlock]) -> None:
        block = blocks[kept.block]
        held = _Round(block.elements)
        held.total[:] = arrays[f"{kept.block}.round"]
        held.contributors, held.waiting = set(kept.contributors), set(kept.waiting)
        held.updates, held.staleness = kept.updates, kept.staleness
        self._rounds[kept.block] = block, held

    @property
    def publish_period(self) -> int | None:
        return 1  # a version is a whole round

    @property
    def pending_updates(self) -> int:
        return sum(open_round.updates for _, open_round in self._rounds.values())

    def _close_if_full(self, block: HeldBlock, open_round: _Round) -> None:
        if not self._is_draining and len(open_round.contributors) < self._quorum:
            return
        divisor = max(open_round.updates, self._quorum) if self._is_draining else open_round.updates
        open_round.total /= np.float32(divisor)
        del self._rounds[block.index]
        self._closed[block.index] = self._closed.get(block.index, 0) + 1
        self._apply(block, self._fp32, open_round.total.view(np.uint8), open_round.staleness)


POLICIES: dict[str, type[Policy]] = {policy.mode: policy for policy in (AsyncPolicy, BoundedPolicy, SyncPolicy)}


def make_policy(job: Job, apply: Apply) -> Policy:
    """The policy object of a job. The job specification has refused modes that are not in POLICIES."""
    return POLICIES[job.consistency.mode](job, apply)
