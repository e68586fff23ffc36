"""What a shard's journal holds: one class a decision that changed its state, in the order in which they were made.

A record says what was decided, never why: whatever depended on a clock, on who had pushed lately or on a sum of
squares is written down as its outcome, and a replay follows it. What follows from the records by arithmetic that is
bit-identical (weights, optimiser state, the bytes of a published delta) is not written but made again: deltas would
add half of the bytes to a log of int4 updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from paramserver.encoding.base import Bytes
from paramserver.protocol.messages import BlockUpdate, Member, PartOrder, Push

# What came of an applied update in the published replica of its block: one of three, and whether the block is still.
NOT_DUE, PUBLISHED, HELD_BACK = 0, 1, 2
STILL = 4


class Decision(Struct, frozen=True, array_like=True):
    """One step of the optimiser on a block: the factor of its learning rate, and what was published after it."""

    block: int
    lr_factor: float
    outcome: int


class Record(Struct, frozen=True, array_like=True):
    """Base of everything that is written. Its frames lie behind it, one after another."""


class TakenUp(Record, frozen=True, tag=1):
    """The job was taken up with nothing but zeros; `build` names what computes (see `keeper.this_build`)."""

    order: PartOrder
    build: str


class Ordered(Record, frozen=True, tag=2):
    """The coordinator's order changed. `decisions` are rounds that closed because a member left."""

    term: int
    phase: int
    blocks: tuple[int, ...]
    members: tuple[Member, ...]
    decisions: tuple[Decision, ...] = ()


class FirstValues(Record, frozen=True, tag=3):
    """Blocks got their first values; a frame each, float32."""

    blocks: tuple[int, ...]


class Pushed(Record, frozen=True, tag=4):
    """The updates of one push that were taken; a frame each, as they came, of `sizes` bytes.

    `decisions` has an entry for each step of an optimiser that they led to, in order: one an update, but for `sync`.
    """

    worker: str
    incarnation: int
    step: int  # the worker's clock
    is_pull_slow: bool  # as the worker said: the publishing period follows it
    updates: tuple[BlockUpdate, ...]
    sizes: tuple[int, ...]
    decisions: tuple[Decision, ...]


def pushed(push: Push, taken: Sequence[tuple[BlockUpdate, Bytes]], decisions: tuple[Decision, ...]) -> Pushed:
    """The record of a push of which these updates, with their frames, were taken."""
    updates, sizes = tuple([update for update, _ in taken]), tuple([frame.size for _, frame in taken])
    return Pushed(push.worker, push.incarnation, push.step, push.is_pull_slow, updates, sizes, decisions)


class Published(Record, frozen=True, tag=5):
    """The timer published these (block, edition)."""

    editions: tuple[tuple[int, int], ...]


class Ticked(Record, frozen=True, tag=6):
    """A worker's clock, where the policy counts it, and no update of this message was taken."""

    worker: str
    step: int


class Greeted(Record, frozen=True, tag=7):
    """A worker said Hello, where the policy counts clocks: it may count its steps from the start again."""

    worker: str


class Restored(Record, frozen=True, tag=20):
    """A block without a value goes on from a checkpoint; a frame an array, of `sizes` bytes."""

    block: int
    state: str
    arrays: tuple[str, ...]
    sizes: tuple[int, ...]


AnyRecord = TakenUp | Ordered | FirstValues | Pushed | Published | Ticked | Greeted | Restored


class Journal(Protocol):
    """Where the core writes. What it decided may be told to nobody before the loop around it has committed."""

    def append(self, record: AnyRecord, frames: Sequence[Bytes] = ()) -> None:
        """Take a record. `frames` are read during the call only."""
        ...
