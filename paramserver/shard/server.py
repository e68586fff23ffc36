"""A shard's loop: sockets, clock, heartbeats and journal around the core. Synchronous, one thread, asleep when idle.

What a peer is told rests on what was decided before, so where the job has a journal no reply leaves before a commit.
While the disk refuses, replies wait, and so do the messages behind them: peers resend, and memory does not grow.
"""

from __future__ import annotations

from time import monotonic, perf_counter

from paramserver.process import StopRequest, log
from paramserver.protocol.backlog import UNREAD_BYTES
from paramserver.protocol.membership import Membership
from paramserver.protocol.messages import Orders, Refusal, Register, ShardOrder, ShardReport
from paramserver.protocol.patience import HOSTILE, IGNORE_SECONDS, Patience
from paramserver.protocol.transport import Channel, Listener, Malformed, Peer, Received, Transport
from paramserver.shard.core import Reply, ShardCore
from paramserver.shard.journal.home import JournalHome
from paramserver.shard.journal.keeper import ShardJournal
from paramserver.shard.journal.layout import JournalError
from paramserver.shard.preparation import Preparation

BATCH_MESSAGES = 64  # handled in a row before the control channel gets a look
MOST_TEXT = 4096
MOST_NAMES = 1024  # workers that a report lists; strangers may have said Hello by the thousand
LONGEST_WAIT_SECONDS = 0.5  # how late a stop request may be seen
PREPARING_WAIT_SECONDS = 0.05  # how late the end of a compilation may be seen
PUBLISH_LOOK_SECONDS = 0.1  # between two looks at what the timer should publish
REFUSED_LOOK_SECONDS = 0.25  # between two tries to write what the disk refused
HELD_BYTES = 8 * 2**20  # of replies that wait for one commit


class ShardServer:
    """Runs a ShardCore until it is told to stop. Owns its listener and control channel."""

    def __init__(
        self,
        core: ShardCore,
        transport: Transport,
        listen: str,
        coordinator: str,
        introduction: Register,
        home: JournalHome | None = None,
        journal: ShardJournal | None = None,
        *,
        coordinator_key: str = "",
    ) -> None:
        """Raises TransportError where `listen` cannot be bound.

        `introduction.address` is what workers are told; where it is empty it is the bound address. `home` is where
        journals are; without it jobs that want one are refused. `journal` is that of what the core serves already.
        """
        self.core = core
        self._home = home
        self._journal = journal
        self._held: list[Reply] = []  # until the next commit
        self._held_bytes = 0
        self._failure = ("", "")  # a job that cannot be served here, and why
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
        self._told = core.serving  # what the log and the counters are about

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
                is_refused = bool(self._journal_trouble())
                if is_refused:
                    longest = min(longest, REFUSED_LOOK_SECONDS)
                elif started >= self._publish_at:
                    self._publish_at = started + PUBLISH_LOOK_SECONDS
                    self._unpublished = self.core.publish_due(monotonic())
                if self._unpublished:
                    longest = min(longest, PUBLISH_LOOK_SECONDS)
                timeout = min(self._membership.seconds_to_next(monotonic()), longest)
                ready = self._transport.wait(
                    [self._control] if is_refused else [self._listener, self._control], timeout
                )
                woken = perf_counter()
                if self._listener in ready:
                    self._serve_batch()
                if self._control in ready:
                    self._obey()
                if self._preparation is not None:
                    self._end_preparation(self._preparation)
                self._commit()
                self._waiting_seconds += woken - started
                self._working_seconds += perf_counter() - woken
        finally:
            self._drop_journal()
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
            self._reply(replies)
            if len(replies) == 1 and isinstance(refusal := replies[0].message, Refusal) and refusal.code in HOSTILE:
                self._tire(replies[0].peer)
            if self._journal_trouble():
                return

    # ------------------------------------------------------------------------- durability

    def _reply(self, replies: list[Reply]) -> None:
        """Send these, and what waits before them, as soon as what they rest on is durable."""
        journal = self._journal
        if journal is None or (journal.is_durable and not self._held):
            self._send(replies)
            return
        self._held += replies
        self._held_bytes += sum(frame.size for reply in replies for frame in reply.frames)
        if journal.is_durable or self._held_bytes > HELD_BYTES:
            self._commit()

    def _commit(self) -> None:
        """Make durable what was decided, then send what waits for it; or keep it where the disk refuses."""
        journal, serving = self._journal, self.core.serving
        if journal is None or serving is None:
            return
        before = journal.trouble
        is_done = journal.commit()
        if journal.trouble != before:
            level, text = ("info", "writing again") if is_done else ("error", journal.trouble)
            log("journal", level=level, state=text, held=len(self._held))
            self._membership.beat_soon()
        if not is_done:
            return
        self._send_held()
        journal.snapshot_if_due(serving)

    def _send_held(self) -> None:
        held, self._held, self._held_bytes = self._held, [], 0
        self._send(held)

    def _journal_trouble(self) -> str:
        return "" if self._journal is None else self._journal.trouble

    def _drop_journal(self) -> None:
        """The job is over, or this process is. What cannot be written is not acknowledged."""
        journal, self._journal = self._journal, None
        if journal is not None:
            try:
                if journal.commit():
                    self._send_held()
            finally:
                journal.close()
        self._held, self._held_bytes = [], 0
        if self._preparation is not None:
            self._preparation.abandon()
            self._preparation = None

    def _end_preparation(self, preparation: Preparation) -> None:
        """Take the order up when what it needs is there; a journal that cannot be used fails the job, not the shard."""
        try:
            if not preparation.is_over():
                return
        except JournalError as error:
            self._preparation = None
            self._failure = preparation.order.job, str(error)
            log("journal-unusable", level="error", job=preparation.order.job, reason=error)
            self._membership.beat_soon()
            return
        self._preparation = None
        opened = preparation.take()
        if opened is not None:
            serving, self._journal = opened
            self.core.adopt(serving)
        self._become(preparation.order)

    # --------------------------------------------------------------------------- messages

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
        if order is not None and serving is not None and serving.order.job == order.job:
            self._become(order)
        elif order is not None and waiting is not None and waiting.order.job == order.job:
            waiting.order = order
        elif order is None or order.job != self._failure[0]:
            self._failure = ("", "")
            self._drop_journal()
            self._become(None)
            if order is not None:
                self._preparation = Preparation(order, self._home)

    def _become(self, order: ShardOrder | None) -> None:
        self._reply(self.core.take_order(order))
        self._limit_unread()
        if self.core.serving is not self._told:
            self._told = self.core.serving
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
            job, failed = self._failure
            return ShardReport(
                job=job,
                refusals=dict(self.core.refusals),
                handshake_failures=self._listener.handshake_failures,
                failed=failed[:MOST_TEXT],
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
            refusing_disk=self._journal_trouble()[:MOST_TEXT],
            journal_bytes=0 if self._journal is None else self._journal.written_bytes,
        )
