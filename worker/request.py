"""One message that a shard must answer, and what of its answer has not come yet. It decides what is sent again."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from paramserver.protocol.messages import Initialise, Message, Pull, Push
from paramserver.protocol.transport import Bytes, Sending

# A sequence above it is a question: no shard is so far, so it is refused with the number that is next, and
# a copy of it that is late can never be taken for a later update.
ASKING = 2**61


@dataclass
class Request:
    """A message that must be answered. `frames` may not change until it is complete and its sendings are done."""

    message: Push | Pull | Initialise
    frames: list[Bytes] = field(default_factory=list)
    undecided: dict[int, int] = field(default_factory=dict)  # block -> position, of updates without a verdict
    awaited: set[int] = field(default_factory=set)  # blocks whose value has not come
    is_unconfirmed: bool = False  # an Initialise without its Initialised
    is_held: bool = False  # its pull waits for slower workers
    has_final_refusals: bool = False
    due: float = 0.0
    attempts: int = 0
    sendings: list[Sending] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return not (self.undecided or self.awaited or self.is_unconfirmed)

    def as_sent(self, term: int) -> tuple[Message, list[Bytes]]:
        """What goes out: the same message each time, but for a new term and for parts that are decided."""
        if self.message.term != term:
            self.message = msgspec.structs.replace(self.message, term=term)
        message = self.message
        if not isinstance(message, Push):
            return message, self.frames
        if not self.undecided:
            # All updates are decided: only values are missing, and asking for them is idempotent.
            return self._pull_of(message), []
        if self.has_final_refusals:
            # What went back into the residual may not be applied after all.
            kept = sorted(self.undecided.values())
            updates = tuple(message.updates[position] for position in kept)
            return msgspec.structs.replace(message, updates=updates), [self.frames[position] for position in kept]
        return message, self.frames

    def renumber(self, position: int, sequence: int) -> None:
        """Give the update at this position the sequence that the shard expects."""
        assert isinstance(self.message, Push)  # only a Push carries updates
        updates = list(self.message.updates)
        updates[position] = msgspec.structs.replace(updates[position], sequence=sequence)
        self.message = msgspec.structs.replace(self.message, updates=tuple(updates))

    def _pull_of(self, push: Push) -> Pull:
        return Pull(
            request=push.request,
            job=push.job,
            term=push.term,
            phase=push.phase,
            worker=push.worker,
            incarnation=push.incarnation,
            step=push.step,
            wants=tuple(want for want in push.wants if want.block in self.awaited),
        )
