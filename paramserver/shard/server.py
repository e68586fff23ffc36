"""A shard's loop: sockets, clock and heartbeats around its parts. Synchronous, one thread, asleep when idle.

A worker's connection is about the part that its Hello names. While a disk refuses what a part's journal must hold, the
messages behind it wait in the sockets: peers resend, and memory does not grow. While a backup is slow, workers of that
part are not listened to in the end; other primaries always are, or two shards could wait for each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from time import monotonic, perf_counter

from paramserver.process import StopRequest, log
from paramserver.protocol.backlog import UNREAD_BYTES
from paramserver.protocol.membership import Membership
from paramserver.protocol.messages import (
    CheckpointStored,
    Hello,
    KeptBlock,
    Orders,
    PartOrder,
    Refusal,
    RefusalCode,
    Register,
    Replicate,
    ShardOrder,
    ShardReport,
    Tick,
)
from paramserver.protocol.patience import HOSTILE, IGNORE_SECONDS, Patience
from paramserver.protocol.transport import Channel, Endpoint, Listener, Malformed, Peer, Received, Transport
from paramserver.shard.core import Reply, ShardCore
from paramserver.shard.journal.home import Home
from paramserver.shard.journal.keeper import ShardJournal
from paramserver.shard.part import Part
from paramserver.shard.preparation import Preparation
from paramserver.shard.replication.standby import Standby
from paramserver.shard.surroundings import Surroundings

BATCH_MESSAGES = 64  # handled in a row before the control channel gets a look
LONGEST_WAIT_SECONDS = 0.5  # how late a stop request may be seen
PREPARING_WAIT_SECONDS = 0.05  # how late the end of a compilation may be seen
REPLICATING_WAIT_SECONDS = 0.1  # how late it may be seen that a backup does not answer
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
        home: Home | None = None,
        *,
        coordinator_key: str = "",
        clock: Callable[[], float] = monotonic,
        prepare: Callable[[PartOrder, Home | None], Preparation] | None = None,
        in_background: bool = True,
    ) -> None:
        """Raises TransportError where `listen` cannot be bound.

        `introduction.address` is what workers are told; where it is empty it is the bound address. `home` is where
        journals are; without it jobs that want one are refused. The last three are for simulations: see Surroundings.
        """
        self.refusals: Counter[str] = Counter()
        """Of messages that are for no part, by name."""
        self._parts: dict[str, Part] = {}  # of which this shard is the primary
        self._standbys: dict[str, Standby] = {}  # of which it is the backup
        self._clock = clock
        self._transport = transport
        self._listener: Listener = transport.listen(listen)
        self._control: Channel = transport.connect(coordinator, coordinator_key)
        fields = {name: getattr(introduction, name) for name in introduction.__struct_fields__}
        fields["address"] = introduction.address or self._listener.address
        self._membership = Membership(Register(**fields), self.report)
        self._around = Surroundings(
            listener=self._listener,
            connect=transport.connect,
            identity=lambda: (introduction.name, self._membership.incarnation),
            home=home,
            clock=clock,
            prepare=prepare or (lambda order, where: Preparation(order, where)),
            in_background=in_background,
        )
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
        """Serve what this core serves already, without a coordinator's order. Call before `run` and `follow`."""
        self._parts[core.name] = Part(core, self._around, journal)
        self._limit_unread()

    def run(self, stop: StopRequest) -> None:
        """Serve until `stop` is set or the coordinator says shut down; then close the sockets.

        Raises MembershipError when the coordinator refuses this process for good.
        """
        try:
            while not stop.is_set() and not self._must_stop:
                self.turn(LONGEST_WAIT_SECONDS)
        finally:
            self.close()

    def turn(self, longest_seconds: float) -> None:
        """One turn of the loop: wait for something to do, at most so long, and do it."""
        self._beat()
        started = perf_counter()
        is_refused = any(holder.trouble for holder in self._holders)
        timeout = self._longest_wait(self._clock(), is_refused)
        channels = [part.channel for part in self._parts.values() if part.channel is not None]
        ends: list[Endpoint] = [self._control, *channels]
        if not is_refused:
            ends.insert(0, self._listener)
        ready = self._transport.wait(ends, min(longest_seconds, timeout))
        woken = perf_counter()
        if self._listener in ready:
            self._serve_batch()
        if self._control in ready:
            self._obey()
        self._look_after_parts(is_idle=not ready)
        self._waiting_seconds += woken - started
        self._working_seconds += perf_counter() - woken

    def close(self) -> None:
        """Let go of journals and sockets."""
        for part in self._parts.values():
            part.drop_journal()
        for standby in self._standbys.values():
            standby.close()
        self._listener.close()
        self._control.close()

    @property
    def _holders(self) -> list[Part | Standby]:
        return [*self._parts.values(), *self._standbys.values()]

    def _longest_wait(self, now: float, is_refused: bool) -> float:
        """How long the loop may sleep; what the timer should publish is published first."""
        longest = LONGEST_WAIT_SECONDS
        if any(standby.has_pending for standby in self._standbys.values()):
            longest = 0.0  # there is something to do when nothing comes
        elif any(part.is_replicating for part in self._parts.values()):
            longest = REPLICATING_WAIT_SECONDS
        if any(holder.is_preparing for holder in self._holders):
            longest = min(longest, PREPARING_WAIT_SECONDS)
        if is_refused:
            longest = min(longest, REFUSED_LOOK_SECONDS)
        elif now >= self._publish_at:
            self._publish_at = now + PUBLISH_LOOK_SECONDS
            self._unpublished = sum(part.publish_due(now) for part in self._parts.values())
        if self._unpublished:
            longest = min(longest, PUBLISH_LOOK_SECONDS)
        return min(self._membership.seconds_to_next(now), longest)

    def _look_after_parts(self, is_idle: bool) -> None:
        for part in self._parts.values():
            has_changed = part.look_after_preparation()
            if has_changed:
                self._limit_unread()
            if part.look_after() or has_changed:
                self._membership.beat_soon()
        for standby in self._standbys.values():
            if standby.look_after():
                self._membership.beat_soon()
            standby.apply(is_idle)

    # --------------------------------------------------------------------------- messages

    def _serve_batch(self) -> None:
        for _ in range(BATCH_MESSAGES):
            message = self._listener.receive(0)
            if message is None:
                return
            if self._patience and self._is_ignored(message.peer):
                continue
            if isinstance(message, Received) and isinstance(message.message, Replicate):
                self._replicate(message, message.message)
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

    def _replicate(self, received: Received, message: Replicate) -> None:
        """For the part that it names, where this shard is the backup."""
        standby = self._standbys.get(message.part)
        if standby is not None:
            refusal = standby.handle(received, message)
        else:
            part = self._parts.get(message.part)
            term = 0 if part is None or part.core.serving is None else part.core.serving.order.term
            if term:
                code: RefusalCode = "wrong-term"
                detail = f"found placement term {message.term}, this shard is the primary under {term}"
            else:
                code, detail = "unknown-part", f"this shard is no backup of {message.part!r}"
            self.refusals[code] += 1
            refusal = Refusal(code=code, detail=detail)
            self._listener.send(received.peer, refusal)
        if refusal is not None and refusal.code in HOSTILE:
            self._tire(received.peer)

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
        if not self._patience.is_ignored(self._listener.key_of(peer).encode() or peer, self._clock()):
            return False
        self.refusals["ignored"] += 1
        return True

    def _tire(self, peer: Peer) -> None:
        if self._patience.wears_out(self._listener.key_of(peer).encode() or peer, self._clock()):
            log("peer-ignored", level="warning", seconds=IGNORE_SECONDS, key=self._listener.key_of(peer) or "none")

    def _limit_unread(self) -> None:
        self._listener.limit_unread(max([UNREAD_BYTES, *(part.unread_bytes for part in self._parts.values())]))

    # ------------------------------------------------------------------------ coordinator

    def _beat(self) -> None:
        message = self._membership.due(self._clock())
        if self._membership.must_reset:
            log("coordinator-unreachable", level="warning", address=self._control.address)
            self._control.reset()
            self._membership.must_reset = False
        if message is not None:
            self._control.send(message)
        if self._membership.is_registered:
            self._run_errands()

    def _run_errands(self) -> None:
        """Send what parts have for the coordinator beside their report."""
        name, incarnation = self._membership.introduction.name, self._membership.incarnation
        for part in self._parts.values():
            for message, frames in part.errands(name, incarnation, self._clock()):
                self._control.send(message, frames)

    def _obey(self) -> None:
        while (received := self._control.receive(0)) is not None:
            if isinstance(received, Malformed):
                self.refusals["malformed"] += 1
                continue
            answer = received.message
            if isinstance(answer, CheckpointStored | KeptBlock):
                part = self._parts.get(answer.part)
                if part is not None and part.hear(answer, received.frames):
                    self._membership.beat_soon()
            orders = self._membership.hear(received.message, self._clock())
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
        self.follow(orders.order.parts if orders.order is not None else ())

    def follow(self, orders: tuple[PartOrder, ...]) -> None:
        """Hold the parts of these orders, in their roles, and no others."""
        before = {name: part.core.serving for name, part in self._parts.items()}
        job = orders[0].job if orders else ""
        if job != self._job:
            self._job = job
            self.refusals.clear()
            self._waiting_seconds = self._working_seconds = 0.0
        wanted = {order.part: order for order in orders}
        for name in [name for name in self._parts if name not in wanted]:
            self._parts.pop(name).follow(None)
        for name in [name for name in self._standbys if name not in wanted]:
            self._standbys.pop(name).close()
        for order in orders:
            if order.role == "primary":
                self._be_primary(order)
            else:
                self._be_backup(order)
        if {name: part.core.serving for name, part in self._parts.items()} != before:
            self._limit_unread()
            self._membership.beat_soon()

    def _be_primary(self, order: PartOrder) -> None:
        name = order.part
        standby = self._standbys.get(name)
        if standby is not None:
            if standby.order.job == order.job and order.term < standby.order.term:
                return  # older than what this shard has heard already
            del self._standbys[name]
            self._promote(standby, order)
        if name not in self._parts:
            self._parts[name] = Part(ShardCore(name), self._around)
        self._parts[name].follow(order)

    def _promote(self, standby: Standby, order: PartOrder) -> None:
        """Serve what this shard was the backup of; where it is another job's, or not whole, its files decide."""
        if standby.order.job != order.job:
            standby.close()
            return
        stored = standby.promote()
        if stored is None:
            why = (
                f"ordered to serve {order.part!r} under term {order.term}, of which it has no whole copy as its backup"
            )
            log("promoted-without-state", level="error", part=order.part, term=order.term)
            self._parts[order.part] = Part(ShardCore(order.part), self._around)
            self._parts[order.part].fail(order, f"{why}; the journal of the shard that served it before is needed")
            return
        serving, journal = stored
        core = ShardCore(order.part)
        core.adopt(serving)
        self._parts[order.part] = Part(core, self._around, journal)
        log("promoted", part=order.part, term=order.term, record=journal.number)

    def _be_backup(self, order: PartOrder) -> None:
        name = order.part
        part, standby = self._parts.get(name), self._standbys.get(name)
        if part is not None:
            serving = part.core.serving
            if serving is not None and serving.order.job == order.job and order.term < serving.order.term:
                return
            del self._parts[name]
            part.follow(None)
        if standby is not None and standby.order.job != order.job:
            self._standbys.pop(name).close()
        if name in self._standbys:
            self._standbys[name].follow(order)
        else:
            self._standbys[name] = Standby(order, self._around)

    def report(self) -> ShardReport:
        """The counters of a heartbeat."""
        reports = [holder.report() for holder in self._holders]
        return ShardReport(
            parts=tuple([report for report in reports if report is not None]),
            refusals=dict(self.refusals),
            waiting_seconds=self._waiting_seconds,
            working_seconds=self._working_seconds,
            handshake_failures=self._listener.handshake_failures,
            dropped=self._listener.dropped,
        )
