"""Sessions: who is a member, under which incarnation, and until when. No I/O, no clock.

A name belongs to one live process. Its incarnation grows with every process that carries it, also across
restarts of the coordinator, so that a successor is never taken for its predecessor.

Where the cluster uses keys a session is bound to the key of its connection: another key neither renews nor moves it.
A name whose process may live, although it has no session, is kept for its key: an incarnation until its successor, and
every name for as long as a session lasts after the coordinator's own start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from paramserver.protocol.messages import (
    PROTOCOL_VERSION,
    Heartbeat,
    Lease,
    Refusal,
    Register,
    Registered,
    ShardReport,
    WorkerReport,
)
from paramserver.protocol.transport import Peer

SESSION_SECONDS = 3.0
SESSION_BEATS = 6  # heartbeats in the time that a session lasts: a few may be lost
MAX_SESSIONS = 8192
MAX_NAMES = 100_000  # names are never forgotten, so that an incarnation never comes again


@dataclass
class Session:
    """One live process, as the coordinator sees it."""

    name: str
    role: Literal["shard", "worker"]
    incarnation: int
    peer: Peer
    address: str
    host: str
    pid: int
    since: float
    heard_at: float
    number: int = 0  # of the last order that was sent
    report: ShardReport | WorkerReport | None = None  # None until the first heartbeat
    pending: dict[int, tuple[int, Lease]] = field(default_factory=dict)
    """Grants that no heartbeat has shown yet: lease number -> (first order that carried it, lease)."""
    stale: set[int] = field(default_factory=set)
    """Leases that it held at the last heartbeat and that are not its own any more."""
    key: str = ""  # the public key that it has proven to hold; empty where the cluster uses no keys
    told: object = None  # what the last order was about: another one is sent unasked when this changes


class Sessions:
    """The members by name. `incarnations` holds the last one of every name that was ever heard of, `keys` its key.

    Args:
        now: monotonic seconds, as in every later call.
    """

    def __init__(
        self,
        incarnations: Mapping[str, int],
        session_seconds: float = SESSION_SECONDS,
        keys: Mapping[str, str] | None = None,
        now: float = 0.0,
    ) -> None:
        self.incarnations = dict(incarnations)
        self.keys = dict(keys or {})
        self._kept_until = now + session_seconds
        self.heartbeat_seconds = session_seconds / SESSION_BEATS
        self.session_seconds = session_seconds
        self._live: dict[str, Session] = {}

    def get(self, name: str) -> Session | None:
        return self._live.get(name)

    def all(self) -> list[Session]:
        return [self._live[name] for name in sorted(self._live)]

    def of(self, role: Literal["shard", "worker"]) -> list[Session]:
        """The live members of a role that have sent a heartbeat, by name."""
        return [session for session in self.all() if session.role == role and session.report is not None]

    def register(self, peer: Peer, message: Register, now: float, key: str = "") -> Registered | Refusal:
        """Let a process join, or join again. Call `expire` first: a dead namesake must be gone by then."""
        if message.version != PROTOCOL_VERSION:
            return Refusal(
                code="wrong-version",
                detail=f"found protocol version {message.version}, this coordinator speaks {PROTOCOL_VERSION}; "
                "install the same paramserver everywhere",
            )
        if message.role == "shard" and not message.address:
            return Refusal(code="malformed", detail=f"shard {message.name!r} registered without an address")
        last = self.incarnations.get(message.name, 0)
        live = self._live.get(message.name)
        if self._is_kept_from(key, message, live, now):
            return Refusal(
                code="wrong-key",
                detail=f"{message.name!r} belongs to a process with another key; start this one with another --name",
            )
        if live is not None and not _is_same_process(live, peer, message):
            return Refusal(
                code="name-taken",
                detail=f"{message.name!r} is a live {live.role} (process {live.pid} on {live.host or 'unknown host'})",
            )
        if live is None and len(self._live) >= MAX_SESSIONS:
            return Refusal(code="not-served", detail=f"there are {MAX_SESSIONS} members already, the most allowed")
        if message.name not in self.incarnations and len(self.incarnations) >= MAX_NAMES:
            return Refusal(
                code="not-served",
                detail=f"{MAX_NAMES} names were used already, the most allowed; give processes stable names, or start "
                "the coordinator with a fresh --state",
            )
        if live is None and 0 < message.incarnation < last:
            return Refusal(
                code="name-taken",
                detail=f"{message.name!r} had a successor (incarnation {last}) after incarnation {message.incarnation}",
            )
        if live is not None:
            live.peer, live.heard_at = peer, now
        else:
            incarnation = message.incarnation or last + 1
            self.incarnations[message.name] = incarnation
            self.keys[message.name] = key
            live = self._live[message.name] = Session(
                name=message.name,
                role=message.role,
                incarnation=incarnation,
                peer=peer,
                address=message.address,
                host=message.host,
                pid=message.pid,
                since=now,
                heard_at=now,
                key=key,
            )
        return Registered(
            incarnation=live.incarnation,
            heartbeat_seconds=self.heartbeat_seconds,
            session_seconds=self.session_seconds,
        )

    def is_of_another(self, name: str, key: str) -> bool:
        """Whether this key speaks in the name of a live process that has another."""
        session = self._live.get(name)
        return session is not None and session.key != key

    def _is_kept_from(self, key: str, message: Register, live: Session | None, now: float) -> bool:
        if live is not None:
            return live.key != key
        owner = self.keys.get(message.name, "")
        if not key or not owner or owner == key:
            return False
        return now < self._kept_until or 0 < message.incarnation == self.incarnations.get(message.name)

    def hear(self, peer: Peer, beat: Heartbeat, now: float) -> Session | None:
        """The session that a heartbeat renews, or None when there is no such session."""
        session = self._live.get(beat.name)
        if session is None or session.incarnation != beat.incarnation:
            return None
        session.peer, session.heard_at = peer, now
        return session

    def expire(self, now: float) -> list[Session]:
        """End and return the sessions of which nothing was heard for `session_seconds`."""
        ended = [session for session in self.all() if now - session.heard_at > self.session_seconds]
        for session in ended:
            del self._live[session.name]
        return ended

    def extend(self, seconds: float) -> None:
        """The coordinator itself was away for so long: nobody could be heard."""
        self._kept_until += seconds
        for session in self._live.values():
            session.heard_at += seconds


def _is_same_process(live: Session, peer: Peer, message: Register) -> bool:
    """Whether a Register comes from the process that has the session.

    A new process gives incarnation 0. It repeats that while the answer is lost: then it is the same
    connection, or the same process on the same host behind a new connection.
    """
    if live.role != message.role:
        return False
    if message.incarnation:
        return message.incarnation == live.incarnation
    return live.peer == peer or (message.pid > 0 and (live.pid, live.host) == (message.pid, message.host))
