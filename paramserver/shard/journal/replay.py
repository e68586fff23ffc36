"""A shard's state from what was kept of it, and records applied to it again, with the code that applied them first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from msgspec import structs

from paramserver.encoding.base import Bytes
from paramserver.protocol.messages import PartOrder
from paramserver.shard.checkpoint import decode_block, restore_block
from paramserver.shard.journal.layout import Entry, JournalError
from paramserver.shard.journal.records import (
    FirstValues,
    Greeted,
    Ordered,
    Published,
    Pushed,
    Restored,
    TakenUp,
    Ticked,
)
from paramserver.shard.journal.states import Arrays, State
from paramserver.shard.serving import Serving
from paramserver.shard.watermarks import Verdict


def kept(serving: Serving) -> tuple[State, Arrays]:
    """The state of a shard, and its arrays: views, which change with the next message."""
    arrays: Arrays = {}
    state = State(
        order=serving.order,
        has_trained=serving.has_trained,
        blocks=tuple(block.kept(arrays) for block in serving.blocks.values()),
        publishing=serving.publishing.kept(arrays),
        policy=serving.policy.kept(arrays),
        telemetry=serving.telemetry.kept(),
    )
    return state, arrays


def restored(state: State, arrays: Arrays, make: Callable[[PartOrder], Serving] = Serving) -> Serving:
    """A shard's state from what was kept; `make` is what it is restored into."""
    serving = make(state.order)
    for block in state.blocks:
        serving.blocks[block.index].restore(block, arrays)
    serving.publishing.restore(state.publishing, arrays, serving.blocks)
    serving.policy.restore(state.policy, arrays, serving.blocks)
    serving.telemetry.restore(state.telemetry)
    serving.has_trained = state.has_trained
    serving.rest()
    return serving


def replay(serving: Serving, entry: Entry) -> None:
    """Do again what a record says. Raises JournalError where it does not fit the state before it."""
    try:
        _replay(serving, entry)
    except (KeyError, IndexError, ValueError) as error:
        raise _diverged(entry, f"{type(error).__name__}: {error}") from error
    if serving.given:
        raise _diverged(entry, f"{len(serving.given)} of its decisions were not needed")
    serving.given = None


def _replay(serving: Serving, entry: Entry) -> None:
    match entry.record:
        case Pushed() as push:
            _push(serving, entry, push)
        case Ordered() as order:
            serving.given = deque(order.decisions)
            followed = structs.replace(
                serving.order, term=order.term, phase=order.phase, blocks=order.blocks, members=order.members
            )
            serving.follow(followed)
        case FirstValues() as first:
            blocks = [serving.blocks[index] for index in first.blocks]
            values = _cut(entry.frames, [4 * block.elements for block in blocks])
            serving.initialise(list(zip(blocks, values, strict=True)))
        case Published() as published:
            for index, edition in published.editions:
                if serving.publishing.publish(index) != edition:
                    raise _diverged(entry, f"block {index} has another edition than {edition}")
        case Ticked() as ticked:
            serving.policy.tick(ticked.worker, ticked.step)
        case Greeted() as greeted:
            serving.policy.greeted(greeted.worker)
        case Restored() as block:
            frames = [frame.data for frame in _cut(entry.frames, block.sizes)]
            restore_block(serving, *decode_block(block.state, block.arrays, frames))
        case TakenUp():
            raise _diverged(entry, "the job was taken up before")


def _push(serving: Serving, entry: Entry, push: Pushed) -> None:
    serving.given = deque(push.decisions)
    for update, frame in zip(push.updates, _cut(entry.frames, push.sizes), strict=True):
        block, encoding = serving.blocks[update.block], serving.encoding_of(update)
        if encoding is None or block.marks.judge(push.worker, push.incarnation, update.sequence) is not Verdict.NEXT:
            raise _diverged(entry, f"update {update} of {push.worker} is not the next one")
        staleness = serving.publishing.staleness(block, update.edition)
        is_slow = push.is_pull_slow
        serving.absorb(block, push.worker, push.incarnation, update.sequence, encoding, frame, staleness, is_slow)
    serving.telemetry.pushes += 1
    serving.policy.tick(push.worker, push.step)


def _cut(frames: Bytes, sizes: tuple[int, ...] | list[int]) -> Iterator[Bytes]:
    """Frames that lie one after another."""
    if sum(sizes) != frames.size:
        raise ValueError(f"its frames have {frames.size} bytes, not {sum(sizes)}")
    at = 0
    for size in sizes:
        yield frames[at : at + size]
        at += size


def _diverged(entry: Entry, why: str) -> JournalError:
    return JournalError(
        f"record {entry.number} ({type(entry.record).__name__}) does not fit the state before it: {why}; the journal "
        "was written by another release or is damaged: submit the job again"
    )
