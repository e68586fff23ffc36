"""One part on a shard: its core, its journal, and the replies that wait until what they rest on is durable.

A part is the blocks that share one journal. What a peer is told rests on what was decided before, so where the job has
a journal no reply leaves before a commit. While the disk refuses, replies wait.
"""

from __future__ import annotations

from paramserver.process import log
from paramserver.protocol.backlog import UNREAD_BYTES
from paramserver.protocol.messages import PartOrder, PartReport
from paramserver.protocol.transport import Listener, Malformed, Peer, Received
from paramserver.shard.core import Reply, ShardCore
from paramserver.shard.journal.home import JournalHome
from paramserver.shard.journal.keeper import ShardJournal
from paramserver.shard.journal.layout import JournalError
from paramserver.shard.preparation import Preparation

MOST_TEXT = 4096
MOST_NAMES = 1024  # workers that a report lists; strangers may have said Hello by the thousand
HELD_BYTES = 8 * 2**20  # of replies that wait for one commit


class Part:
    """Belongs to the loop's thread.

    Args:
        core: new, or one that serves already, with its `journal`, where it has one.
        listener: of the shard; replies go through it.
        home: where journals are; without it jobs that want one are refused.
    """

    def __init__(
        self, core: ShardCore, listener: Listener, home: JournalHome | None, journal: ShardJournal | None = None
    ) -> None:
        self.core = core
        core.memory, core.is_there, core.key_of = listener.memory, listener.is_there, listener.key_of
        self._listener = listener
        self._home = home
        self._journal = journal
        self._held: list[Reply] = []  # until the next commit
        self._held_bytes = 0
        self._preparation: Preparation | None = None
        self._failure = ("", "")  # a job that cannot be served here, and why
        self._bytes_in = 0
        self._bytes_out = 0
        self._told = core.serving  # what the log and the counters are about

    @property
    def name(self) -> str:
        return self.core.name

    @property
    def is_preparing(self) -> bool:
        return self._preparation is not None

    @property
    def trouble(self) -> str:
        """Why the journal cannot be written now; empty where all is well."""
        return "" if self._journal is None else self._journal.trouble

    @property
    def unread_bytes(self) -> int:
        """What a worker may leave unread: it may ask for everything at once, and once more when an answer is late."""
        serving = self.core.serving
        if serving is None:
            return UNREAD_BYTES
        return max(UNREAD_BYTES, 2 * sum(4 * block.elements for block in serving.blocks.values()))

    def knows(self, peer: Peer) -> bool:
        """Whether a worker said Hello to this part through that connection."""
        return self.core.serving is not None and peer in self.core.serving.peers

    # --------------------------------------------------------------------------- messages

    def handle(self, received: Received) -> list[Reply]:
        """The replies, which are sent when they may be."""
        self._bytes_in += received.message_bytes
        replies = self.core.handle(received.peer, received.message, received.frames)
        self._reply(replies)
        return replies

    def malformed(self, malformed: Malformed) -> list[Reply]:
        """The same for what is no message."""
        self._bytes_in += malformed.message_bytes
        replies = [self.core.refuse(malformed.peer, "malformed", malformed.reason)]
        self._reply(replies)
        return replies

    def publish_due(self, now: float) -> int:
        """See `ShardCore.publish_due`."""
        return self.core.publish_due(now)

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
            self.commit()

    def commit(self) -> bool:
        """Make durable what was decided, then send what waits for it; or keep it where the disk refuses.

        Returns whether the disk has begun or ceased to refuse, which the coordinator should hear of at once.
        """
        journal, serving = self._journal, self.core.serving
        if journal is None or serving is None:
            return False
        before = journal.trouble
        is_done = journal.commit()
        has_changed = journal.trouble != before
        if has_changed:
            level, text = ("info", "writing again") if is_done else ("error", journal.trouble)
            log("journal", level=level, part=self.name, state=text, held=len(self._held))
        if is_done:
            self._send_held()
            journal.snapshot_if_due(serving)
        return has_changed

    def _send_held(self) -> None:
        held, self._held, self._held_bytes = self._held, [], 0
        self._send(held)

    def _send(self, replies: list[Reply]) -> None:
        for reply in replies:
            sending = self._listener.send(reply.peer, reply.message, [frame.data for frame in reply.frames])
            self.core.pool.give(reply.loaned, [sending])
            self._bytes_out += sum(frame.size for frame in reply.frames)

    # ----------------------------------------------------------------------------- orders

    def follow(self, order: PartOrder | None) -> None:
        """Do what the order says; a new job waits until its kernels are compiled, and the old one is dropped."""
        serving, waiting = self.core.serving, self._preparation
        if order is not None and serving is not None and serving.order.job == order.job:
            self._become(order)
        elif order is not None and waiting is not None and waiting.order.job == order.job:
            waiting.order = order
        elif order is None or order.job != self._failure[0]:
            self._failure = ("", "")
            self.drop_journal()
            self._become(None)
            if order is not None:
                self._preparation = Preparation(order, self._home)

    def look_after_preparation(self) -> bool:
        """Take the order up when what it needs is there; a journal that cannot be used fails the job, not the shard.

        Returns whether something has changed that the coordinator should hear of at once.
        """
        preparation = self._preparation
        if preparation is None:
            return False
        try:
            if not preparation.is_over():
                return False
        except JournalError as error:
            self._preparation = None
            self._failure = preparation.order.job, str(error)
            log("journal-unusable", level="error", job=preparation.order.job, part=self.name, reason=error)
            return True
        self._preparation = None
        opened = preparation.take()
        if opened is not None:
            serving, self._journal = opened
            self.core.adopt(serving)
        self._become(preparation.order)
        return True

    def drop_journal(self) -> None:
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

    def _become(self, order: PartOrder | None) -> None:
        self._reply(self.core.take_order(order))
        if self.core.serving is not self._told:
            self._told = self.core.serving
            self._bytes_in = self._bytes_out = 0
            if self._told is None:
                log("job-dropped", part=self.name)
            else:
                order = self._told.order
                log("job-taken", job=order.job, part=self.name, term=order.term, blocks=len(order.blocks))

    # ----------------------------------------------------------------------------- report

    def report(self) -> PartReport | None:
        """The counters of a heartbeat; None where nothing is held and nothing has failed."""
        serving = self.core.serving
        if serving is None:
            job, failed = self._failure
            return PartReport(part=self.name, job=job, failed=failed[:MOST_TEXT]) if job else None
        telemetry, publishing, journal = serving.telemetry, serving.publishing, self._journal
        return PartReport(
            part=self.name,
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
            parked_pulls=sum(map(len, serving.parked.values())),
            pending_updates=serving.policy.pending_updates,
            unpublished=publishing.unpublished(),
            editions=publishing.editions(),
            replica_distance=publishing.replica_distance(),
            publish_period=publishing.period(),
            workers=tuple(sorted({worker for worker, _ in serving.peers.values()}))[:MOST_NAMES],
            refusing_disk=self.trouble[:MOST_TEXT],
            journal_bytes=0 if journal is None else journal.written_bytes,
            record=0 if journal is None else journal.number,
        )
