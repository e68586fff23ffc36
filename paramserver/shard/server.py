"""A shard's loop: sockets, clock and heartbeats around the core. Synchronous, one thread, asleep when idle."""

from __future__ import annotations

from time import monotonic, perf_counter

from paramserver.process import StopRequest, log
from paramserver.protocol.backlog import UNREAD_BYTES
from paramserver.protocol.membership import Membership
from paramserver.protocol.messages import Orders, Refusal, Register, ShardOrder, ShardReport
from paramserver.protocol.patience import HOSTILE, IGNORE_SECONDS, Patience
from paramserver.protocol.transport import Channel, Listener, Malformed, Peer, Received, Transport
from paramserver.shard.core import Reply, ShardCore
from paramserver.shard.preparation import Preparation

BATCH_MESSAGES = 64  # handled in a row before the control channel gets a look
MOST_NAMES = 1024  # workers that a report lists; strangers may have said Hello by the thousand
LONGEST_WAIT_SECONDS = 0.5  # how late a stop request may be seen
PREPARING_WAIT_SECONDS = 0.05  # how late the end of a compilation may be seen
PUBLISH_LOOK_SECONDS = 0.1  # between two looks at what the timer should publish


class ShardServer:
    """Runs a ShardCore until it is told to stop. Owns its listener and control channel."""

    def __init__(
        self,
        core: ShardCore,
        transport: Transport,
        listen: str,
        coordinator: str,
        introduction: Register,
        *,
        coordinator_key: str = "",
    ) -> None:
        """Raises TransportError where `listen` cannot be bound.

        `introduction.address` is what workers are told; where it is empty it is the bound address.
        """
        self.core = core
        self._transport = transport
        self._listener: Listener = transport.listen(listen)
        core.memory = self._listener.memory
        core.is_there = self._listener.is_there
        core.key_of = self._listener.key_of
        self._control: Channel = transport.connect(coordinator, coordinator_key)
        fields = {name: getattr(introduction, name) for name in introduction.__struct_fields__}
        fields["address"] = introduction.address or self._listener.address
        self._membership = Membership(Register(**fields), self.report)
        self._bytes_in = 0
        self._bytes_out = 0
        self._waiting_seconds = 0.0
        self._working_seconds = 0.0
        self._must_stop = False
        self._publish_at = 0.0
        self._unpublished = 0  # blocks, at the last look
        self._preparation: Preparation | None = None
        self._patience = Patience()
        self._limit_unread()

    @property
    def address(self) -> str:
        return self._listener.address

    def run(self, stop: StopRequest) -> None:
        """Serve until `stop` is set or the coordinator says shut down; then close the sockets.

        Raises MembershipError when the coordinator refuses this process for good.
        """
        try:
            while not stop.is_set() and not self._must_stop:
                self._beat()
                started = perf_counter()
                longest = LONGEST_WAIT_SECONDS if self._preparation is None else PREPARING_WAIT_SECONDS
                if started >= self._publish_at:
                    self._publish_at = started + PUBLISH_LOOK_SECONDS
                    self._unpublished = self.core.publish_due(monotonic())
                if self._unpublished:
                    longest = min(longest, PUBLISH_LOOK_SECONDS)
                timeout = min(self._membership.seconds_to_next(monotonic()), longest)
                ready = self._transport.wait([self._listener, self._control], timeout)
                woken = perf_counter()
                if self._listener in ready:
                    self._serve_batch()
                if self._control in ready:
                    self._obey()
                if self._preparation is not None and self._preparation.is_over():
                    order, self._preparation = self._preparation.order, None
                    self._become(order)
                self._waiting_seconds += woken - started
                self._working_seconds += perf_counter() - woken
        finally:
            self._listener.close()
            self._control.close()

    def _serve_batch(self) -> None:
        for _ in range(BATCH_MESSAGES):
            message = self._listener.receive(0)
            if message is not None and self._patience and self._is_ignored(message.peer):
                continue
            match message:
                case None:
                    return
                case Received() as received:
                    self._bytes_in += received.message_bytes
                    replies = self.core.handle(received.peer, received.message, received.frames)
                case Malformed() as malformed:
                    self._bytes_in += malformed.message_bytes
                    replies = [self.core.refuse(malformed.peer, "malformed", malformed.reason)]
            self._send(replies)
            if len(replies) == 1 and isinstance(refusal := replies[0].message, Refusal) and refusal.code in HOSTILE:
                self._tire(replies[0].peer)

    def _is_ignored(self, peer: Peer) -> bool:
        if not self._patience.is_ignored(self._listener.key_of(peer).encode() or peer, monotonic()):
            return False
        self.core.refusals["ignored"] += 1
        return True

    def _tire(self, peer: Peer) -> None:
        if self._patience.wears_out(self._listener.key_of(peer).encode() or peer, monotonic()):
            log("peer-ignored", level="warning", seconds=IGNORE_SECONDS, key=self._listener.key_of(peer) or "none")

    def _send(self, replies: list[Reply]) -> None:
        for reply in replies:
            sending = self._listener.send(reply.peer, reply.message, [frame.data for frame in reply.frames])
            self.core.pool.give(reply.loaned, [sending])
            self._bytes_out += sum(frame.size for frame in reply.frames)

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
                self.core.refusals["malformed"] += 1
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
            self.core.refusals["not-served"] += 1
            return
        self._follow(orders.order)

    def _follow(self, order: ShardOrder | None) -> None:
        """Do what the order says; a new job waits until its kernels are compiled, and the old one is dropped."""
        serving, waiting = self.core.serving, self._preparation
        if order is None or (serving is not None and serving.order.job == order.job):
            self._preparation = None
            self._become(order)
        elif waiting is not None and waiting.order.job == order.job:
            waiting.order = order
        else:
            self._preparation = Preparation(order)
            self._become(None)

    def _become(self, order: ShardOrder | None) -> None:
        before = self.core.serving
        self._send(self.core.take_order(order))
        self._limit_unread()
        if self.core.serving is not before:
            self._bytes_in = self._bytes_out = 0
            self._waiting_seconds = self._working_seconds = 0.0
            if self.core.serving is None:
                log("job-dropped")
            else:
                order = self.core.serving.order
                log("job-taken", job=order.job, term=order.term, blocks=len(order.blocks))
            self._membership.beat_soon()

    def _limit_unread(self) -> None:
        """A worker may ask for everything at once, and once more when an answer is late."""
        if self.core.serving is not None:
            weights_bytes = sum(4 * block.elements for block in self.core.serving.blocks.values())
            self._listener.limit_unread(max(UNREAD_BYTES, 2 * weights_bytes))

    def report(self) -> ShardReport:
        """The counters of a heartbeat."""
        serving = self.core.serving
        if serving is None:
            return ShardReport(
                refusals=dict(self.core.refusals),
                handshake_failures=self._listener.handshake_failures,
                dropped=self._listener.dropped,
            )
        telemetry = serving.telemetry
        return ShardReport(
            job=serving.order.job,
            term=serving.order.term,
            blocks=len(serving.blocks),
            initialised_blocks=sum(block.is_initialised for block in serving.blocks.values()),
            elements=sum(block.elements for block in serving.blocks.values()),
            updates=telemetry.updates,
            duplicates=telemetry.duplicates,
            pushes=telemetry.pushes,
            pulls=telemetry.pulls,
            refusals=dict(self.core.refusals),
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            traffic=telemetry.traffic_rows(),
            staleness=telemetry.staleness_rows(),
            waiting_seconds=self._waiting_seconds,
            working_seconds=self._working_seconds,
            parked_pulls=sum(map(len, serving.parked.values())),
            pending_updates=serving.policy.pending_updates,
            unpublished=serving.publishing.unpublished(),
            editions=serving.publishing.editions(),
            replica_distance=serving.publishing.replica_distance(),
            publish_period=serving.publishing.period(),
            workers=tuple(sorted({worker for worker, _ in serving.peers.values()}))[:MOST_NAMES],
            handshake_failures=self._listener.handshake_failures,
            dropped=self._listener.dropped,
        )
