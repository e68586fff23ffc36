"""A shard's loop: sockets, clock and heartbeats around its parts. Synchronous, one thread, asleep when idle.

A connection is about the part that its Hello names. While a disk refuses what a part's journal must hold, the messages
behind it wait in the sockets: peers resend, and memory does not grow.
"""

from __future__ import annotations

from collections import Counter
from time import monotonic, perf_counter

from paramserver.process import StopRequest, log
from paramserver.protocol.backlog import UNREAD_BYTES
from paramserver.protocol.membership import Membership
from paramserver.protocol.messages import (
    Hello,
    Orders,
    PartOrder,
    Refusal,
    RefusalCode,
    Register,
    ShardOrder,
    ShardReport,
    Tick,
)
from paramserver.protocol.patience import HOSTILE, IGNORE_SECONDS, Patience
from paramserver.protocol.transport import Channel, Listener, Malformed, Peer, Received, Transport
from paramserver.shard.core import Reply, ShardCore
from paramserver.shard.journal.home import JournalHome
from paramserver.shard.journal.keeper import ShardJournal
from paramserver.shard.part import Part

BATCH_MESSAGES = 64  # handled in a row before the control channel gets a look
LONGEST_WAIT_SECONDS = 0.5  # how late a stop request may be seen
PREPARING_WAIT_SECONDS = 0.05  # how late the end of a compilation may be seen
PUBLISH_LOOK_SECONDS = 0.1  # between two looks at what the timer should publish
REFUSED_LOOK_SECONDS = 0.25  # between two tries to write what the disk refused


class ShardServer:
    """Holds parts until it is told to stop. Owns its listener and control channel."""

    def __init__(
        self,
        transport: Transport,
        listen: str,
        coordinator: str,
        introduction: Register,
        home: JournalHome | None = None,
        *,
        coordinator_key: str = "",
    ) -> None:
        """Raises TransportError where `listen` cannot be bound.

        `introduction.address` is what workers are told; where it is empty it is the bound address. `home` is where
        journals are; without it jobs that want one are refused.
        """
        self.refusals: Counter[str] = Counter()
        """Of messages that are for no part, by name."""
        self._home = home
        self._parts: dict[str, Part] = {}
        self._transport = transport
        self._listener: Listener = transport.listen(listen)
        self._control: Channel = transport.connect(coordinator, coordinator_key)
        fields = {name: getattr(introduction, name) for name in introduction.__struct_fields__}
        fields["address"] = introduction.address or self._listener.address
        self._membership = Membership(Register(**fields), self.report)
        self._job = ""  # of the last order
        self._waiting_seconds = 0.0
        self._working_seconds = 0.0
        self._must_stop = False
        self._publish_at = 0.0
        self._unpublished = 0  # blocks, at the last look
        self._patience = Patience()

    @property
    def address(self) -> str:
        return self._listener.address

    def hold(self, core: ShardCore, journal: ShardJournal | None = None) -> None:
        """Serve what this core serves already, without a coordinator's order. Call before `run`."""
        self._parts[core.name] = Part(core, self._listener, self._home, journal)
        self._limit_unread()

    def run(self, stop: StopRequest) -> None:
        """Serve until `stop` is set or the coordinator says shut down; then close the sockets.

        Raises MembershipError when the coordinator refuses this process for good.
        """
        try:
            while not stop.is_set() and not self._must_stop:
                self._beat()
                started = perf_counter()
                is_refused = any(part.trouble for part in self._parts.values())
                timeout = self._longest_wait(started, is_refused)
                ready = self._transport.wait(
                    [self._control] if is_refused else [self._listener, self._control], timeout
                )
                woken = perf_counter()
                if self._listener in ready:
                    self._serve_batch()
                if self._control in ready:
                    self._obey()
                self._look_after_parts()
                self._waiting_seconds += woken - started
                self._working_seconds += perf_counter() - woken
        finally:
            for part in self._parts.values():
                part.drop_journal()
            self._listener.close()
            self._control.close()

    def _longest_wait(self, now: float, is_refused: bool) -> float:
        """How long the loop may sleep; what the timer should publish is published first."""
        longest = LONGEST_WAIT_SECONDS
        if any(part.is_preparing for part in self._parts.values()):
            longest = PREPARING_WAIT_SECONDS
        if is_refused:
            longest = min(longest, REFUSED_LOOK_SECONDS)
        elif now >= self._publish_at:
            self._publish_at = now + PUBLISH_LOOK_SECONDS
            self._unpublished = sum(part.publish_due(monotonic()) for part in self._parts.values())
        if self._unpublished:
            longest = min(longest, PUBLISH_LOOK_SECONDS)
        return min(self._membership.seconds_to_next(monotonic()), longest)

    def _look_after_parts(self) -> None:
        for part in self._parts.values():
            has_changed = part.look_after_preparation()
            if has_changed:
                self._limit_unread()
            if part.commit() or has_changed:
                self._membership.beat_soon()

    # --------------------------------------------------------------------------- messages

    def _serve_batch(self) -> None:
        for _ in range(BATCH_MESSAGES):
            message = self._listener.receive(0)
            if message is None:
                return
            if self._patience and self._is_ignored(message.peer):
                continue
            part = self._part_for(message)
            if part is None:
                replies = self._answer_stray(message)
            elif isinstance(message, Received):
                replies = part.handle(message)
            else:
                replies = part.malformed(message)
            if len(replies) == 1 and isinstance(refusal := replies[0].message, Refusal) and refusal.code in HOSTILE:
                self._tire(replies[0].peer)
            if part is not None and part.trouble:
                return

    def _part_for(self, message: Received | Malformed) -> Part | None:
        """The part that a Hello names, or that this connection said Hello to."""
        if isinstance(message, Received) and isinstance(message.message, Hello):
            return self._parts.get(message.message.part)
        for part in self._parts.values():
            if part.knows(message.peer):
                return part
        return None

    def _answer_stray(self, message: Received | Malformed) -> list[Reply]:
        """Refuse what is for no part of this shard."""
        code: RefusalCode
        match message:
            case Malformed(reason=reason):
                code, detail = "malformed", reason
            case Received(message=Hello(part=part)):
                code, detail = "unknown-part", f"this shard does not serve {part!r}"
            case _:
                code, detail = "unknown-worker", "no Hello came through this connection; say it first"
        self.refusals[code] += 1
        if isinstance(message, Received) and isinstance(message.message, Tick):
            return []  # never answered
        request = getattr(message.message, "request", 0) if isinstance(message, Received) else 0
        refusal = Refusal(request=request, code=code, detail=detail)
        self._listener.send(message.peer, refusal)
        return [Reply(message.peer, refusal)]

    def _is_ignored(self, peer: Peer) -> bool:
        if not self._patience.is_ignored(self._listener.key_of(peer).encode() or peer, monotonic()):
            return False
        self.refusals["ignored"] += 1
        return True

    def _tire(self, peer: Peer) -> None:
        if self._patience.wears_out(self._listener.key_of(peer).encode() or peer, monotonic()):
            log("peer-ignored", level="warning", seconds=IGNORE_SECONDS, key=self._listener.key_of(peer) or "none")

    def _limit_unread(self) -> None:
        self._listener.limit_unread(max([UNREAD_BYTES, *(part.unread_bytes for part in self._parts.values())]))

    # ------------------------------------------------------------------------ coordinator

    def _beat(self) -> None:
        message = self._membership.due(monotonic())
        if self._membership.must_reset:
            log("coordinator-unreachable", level="warning", address=self._control.address)
            self._control.reset()
            self._membership.must_reset = False
        if message is not None:
            self._control.send(message)

    def _obey(self) -> None:
        while (received := self._control.receive(0)) is not None:
            if isinstance(received, Malformed):
                self.refusals["malformed"] += 1
                continue
            orders = self._membership.hear(received.message, monotonic())
            if orders is not None:
                self._take(orders)

    def _take(self, orders: Orders) -> None:
        if orders.shutdown:
            log("shutdown-ordered")
            self._must_stop = True
            return
        if orders.order is not None and not isinstance(orders.order, ShardOrder):
            self.refusals["not-served"] += 1
            return
        self._follow(orders.order.parts if orders.order is not None else ())

    def _follow(self, orders: tuple[PartOrder, ...]) -> None:
        """Hold the parts of these orders, and no others."""
        before = {name: part.core.serving for name, part in self._parts.items()}
        job = orders[0].job if orders else ""
        if job != self._job:
            self._job = job
            self.refusals.clear()
            self._waiting_seconds = self._working_seconds = 0.0
        wanted = {order.part: order for order in orders}
        for name in [name for name in self._parts if name not in wanted]:
            self._parts[name].follow(None)
            del self._parts[name]
        for name, order in wanted.items():
            if name not in self._parts:
                self._parts[name] = Part(ShardCore(name), self._listener, self._home)
            self._parts[name].follow(order)
        if {name: part.core.serving for name, part in self._parts.items()} != before:
            self._limit_unread()
            self._membership.beat_soon()

    def report(self) -> ShardReport:
        """The counters of a heartbeat."""
        reports = [part.report() for part in self._parts.values()]
        return ShardReport(
            parts=tuple([report for report in reports if report is not None]),
            refusals=dict(self.refusals),
            waiting_seconds=self._waiting_seconds,
            working_seconds=self._working_seconds,
            handshake_failures=self._listener.handshake_failures,
            dropped=self._listener.dropped,
        )
