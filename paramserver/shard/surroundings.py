"""What the parts of one shard process share: its sockets, its folder, its clock. A simulation gives its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from time import monotonic

from paramserver.protocol.messages import PartOrder
from paramserver.protocol.transport import Channel, Listener
from paramserver.shard.journal.home import Home
from paramserver.shard.preparation import Preparation


@dataclass(frozen=True)
class Surroundings:
    """Used from the loop's thread.

    Attributes:
        listener: replies go through it.
        connect: makes a channel to another shard, from its address and public key.
        identity: (name, incarnation) of this process; the incarnation is 0 until the coordinator has given one.
        home: where journals are; without it jobs that want one are refused.
        clock: monotonic seconds.
        prepare: makes what an order waits for.
        in_background: snapshots of backups are read in a thread of their own.
        lines: numbers of lines, none of which comes twice in the life of this process.
    """

    listener: Listener
    connect: Callable[[str, str], Channel]
    identity: Callable[[], tuple[str, int]]
    home: Home | None = None
    clock: Callable[[], float] = monotonic
    prepare: Callable[[PartOrder, Home | None], Preparation] = Preparation
    in_background: bool = True
    lines: Iterator[int] = field(default_factory=lambda: count(1))
