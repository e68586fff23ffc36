"""A process's membership, seen from the process: register, beat, obey. No I/O, no clock: the loop asks and tells.

The loop around it sends what `due` returns, hands every message of the control channel to `hear`, and
resets the channel when `due` says so. It never gives up on a coordinator that is away: the process goes
on with its last order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from paramserver.protocol.messages import (
    Heartbeat,
    Message,
    Orders,
    Refusal,
    Register,
    Registered,
    ShardReport,
    WorkerReport,
)

REGISTER_AGAIN_SECONDS = 1.0
UNANSWERED_BEATS = 6  # then the connection is taken for dead: anew, so that no old beats pile up in its queue


class MembershipError(Exception):
    """The coordinator refuses this process for good; the text says why and how to mend it."""


@dataclass
class Membership:
    """Call from one thread only.

    Args:
        introduction: what is sent to join; its incarnation is filled in here.
        report: makes the report of a heartbeat; called only when one is due.
    """

    introduction: Register
    report: Callable[[], ShardReport | WorkerReport]
    incarnation: int = 0
    heartbeat_seconds: float = 0.5
    session_seconds: float = 3.0
    seen: int = 0
    is_registered: bool = False
    must_reset: bool = False  # the loop resets the channel, then clears it
    _next_at: float = 0.0
    _unanswered: int = 0
    _refused_since: float | None = field(default=None)

    def seconds_to_next(self, now: float) -> float:
        return max(0.0, self._next_at - now)

    def beat_soon(self) -> None:
        """Something changed that the coordinator should hear of at once."""
        if self.is_registered:
            self._next_at = 0.0

    def due(self, now: float) -> Message | None:
        """What must be sent now, or None."""
        if now < self._next_at:
            return None
        self._unanswered += 1
        if self._unanswered > UNANSWERED_BEATS:
            self.must_reset = True
            self.is_registered = False
            self._unanswered = 1
        if not self.is_registered:
            self._next_at = now + REGISTER_AGAIN_SECONDS
            fields = {name: getattr(self.introduction, name) for name in self.introduction.__struct_fields__}
            return Register(**{**fields, "incarnation": self.incarnation})
        self._next_at = now + self.heartbeat_seconds
        return Heartbeat(
            name=self.introduction.name, incarnation=self.incarnation, seen=self.seen, report=self.report()
        )

    def hear(self, message: Message, now: float) -> Orders | None:
        """Take a message of the control channel; returns orders that are newer than the last ones.

        Raises MembershipError when the coordinator speaks another protocol version, or keeps saying that
        the name is taken for longer than a dead namesake's session lasts.
        """
        self._unanswered = 0
        match message:
            case Registered():
                self.incarnation = message.incarnation
                self.heartbeat_seconds = message.heartbeat_seconds
                self.session_seconds = message.session_seconds
                self.seen = 0  # a coordinator that forgot us counts its orders from the start
                self.is_registered = True
                self._refused_since = None
                self._next_at = 0.0
            case Orders() if message.number > self.seen:
                self.seen = message.number
                return message
            case Refusal(code="unknown-session"):
                self.is_registered = False
                self._next_at = 0.0
            case Refusal(code="name-taken" | "wrong-key"):
                self.is_registered = False
                self._refused_since = now if self._refused_since is None else self._refused_since
                if now - self._refused_since > 2 * self.session_seconds:
                    raise MembershipError(
                        f"the name {self.introduction.name!r} belongs to a live process: {message.detail}; "
                        "start this one with another --name, or stop the other"
                    )
            case Refusal(code="wrong-version"):
                raise MembershipError(f"the coordinator refuses this protocol version: {message.detail}")
            case _:
                pass  # an answer to a beat that a newer one has overtaken
        return None
