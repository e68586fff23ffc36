"""One part on its primary: its core, its journal, and the replies that wait until what they rest on is durable.

A part is the blocks that share one journal. What a peer is told rests on what was decided before, so where the job has
a journal no reply leaves before a commit, and where a backup is in step, none before that has stored as much. Both are
awaited at once, and nothing else is: the loop goes on meanwhile. While the disk or the backup refuses, replies wait.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from paramserver.process import log
from paramserver.protocol.backlog import UNREAD_BYTES
from paramserver.protocol.messages import CheckpointStored, KeptBlock, PartOrder, PartReport
from paramserver.protocol.transport import Channel, Malformed, Peer, Received
from paramserver.shard.core import Reply, ShardCore
from paramserver.shard.duties import CheckpointDuty, Errand
from paramserver.shard.journal.keeper import ShardJournal
from paramserver.shard.journal.layout import JournalError
from paramserver.shard.preparation import Preparation
from paramserver.shard.replication.link import Link
from paramserver.shard.replication.stream import Stream
from paramserver.shard.surroundings import Surroundings

MOST_TEXT = 4096
MOST_NAMES = 1024  # workers that a report lists; strangers may have said Hello by the thousand
HELD_BYTES = 8 * 2**20  # of replies that wait for one commit
MOST_HELD_BYTES = 64 * 2**20  # of replies that wait for the backup; beyond it workers are not listened to ...
MOST_HELD = 4096  # ... nor beyond so many replies: who is not answered asks again


class Part:
    """Belongs to the loop's thread.

    Args:
        core: new, or one that serves already, with its `journal`, where it has one.
        around: what it shares with the other parts of the shard.
    """

    def __init__(self, core: ShardCore, around: Surroundings, journal: ShardJournal | None = None) -> None:
        self.core = core
        listener = around.listener
        core.memory, core.is_there, core.key_of = listener.memory, listener.is_there, listener.key_of
        self.ignored: Counter[str] = Counter()
        """Messages that were not taken because too many replies wait."""
        self._around = around
        self._listener = listener
        self._journal = journal
        self._link: Link | None = None  # to the backup
        self._held: deque[tuple[int, Reply]] = deque()  # and the record that each waits for
        self._held_bytes = 0
        self._preparation: Preparation | None = None
        self._failure = ("", "")  # a job that cannot be served here, and why
        self._bytes_in = 0
        self._bytes_out = 0
        self._told = core.serving  # what the log and the counters are about
        self._checkpoint = CheckpointDuty(core.name)

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
    def is_full(self) -> bool:
        """Whether so many replies wait that no other message may be taken now."""
        return self._held_bytes > MOST_HELD_BYTES or len(self._held) > MOST_HELD

    @property
    def is_replicating(self) -> bool:
        """Whether something is on its way to the backup, or is to go there."""
        return self._link is not None and self._link.stream.is_busy

    @property
    def channel(self) -> Channel | None:
        """The connection to the backup, to be waited at."""
        return None if self._link is None else self._link.channel

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
        if self.is_full:
            self.ignored["unanswered"] += 1
            return []
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

    @property
    def _settled(self) -> int:
        """The last record that is where it must be."""
        assert self._journal is not None
        link = self._link
        if link is None or not link.stream.must_wait:
            return self._journal.durable
        return min(self._journal.durable, link.stream.stored)

    def _reply(self, replies: list[Reply]) -> None:
        """Send these, and what waits before them, as soon as what they rest on is durable."""
        journal = self._journal
        if journal is None or (not self._held and self._settled == journal.number):
            self._send(replies)
            return
        for reply in replies:
            self._held.append((journal.number, reply))
            self._held_bytes += sum(frame.size for frame in reply.frames)
        if self._held_bytes > HELD_BYTES and not journal.is_durable:
            self.commit()

    def look_after(self) -> bool:
        """What each turn of the loop ends with: hear the backup, commit, give it what is new, and send what may leave.

        Returns whether something has changed that the coordinator should hear of at once.
        """
        now, link = self._around.clock(), self._link
        if link is not None:
            was_synced = link.stream.is_synced
            link.receive(now)
            if self._journal is not None:
                self._journal.flush()
            link.send(now)  # on its way while our own disk makes it durable
        has_changed = self.commit()
        if link is not None:
            self._snapshot_for(link)
            self._send_settled()
            has_changed = has_changed or link.stream.is_synced != was_synced
        return has_changed

    def commit(self) -> bool:
        """Make durable what was decided, then send what waits for it; or keep it where the disk refuses.

        Returns whether the disk has begun or ceased to refuse.
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
            self._send_settled()
            journal.snapshot_if_due(serving)
        return has_changed

    def _snapshot_for(self, link: Link) -> None:
        """A backup that begins gets a snapshot rather than a long log."""
        journal, serving = self._journal, self.core.serving
        if journal is None or serving is None or not link.stream.wants_snapshot:
            return
        if journal.may_snapshot and journal.is_durable:
            journal.snapshot(serving)

    def _send_settled(self) -> None:
        settled = self._settled
        while self._held and self._held[0][0] <= settled:
            _, reply = self._held.popleft()
            self._held_bytes -= sum(frame.size for frame in reply.frames)
            self._send([reply])

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
            self._follow_partner()
        elif order is not None and waiting is not None and waiting.order.job == order.job:
            waiting.order = order
        elif order is None or order.job != self._failure[0]:
            self._failure = ("", "")
            self.drop_journal()
            self._become(None)
            if order is not None:
                self._preparation = self._around.prepare(order, self._around.home)

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
        self._follow_partner()
        return True

    def _follow_partner(self) -> None:
        """Stream to the partner of the order that is served; one with another partner, or none, ends all waiting."""
        serving, journal = self.core.serving, self._journal
        partner = None if serving is None else serving.order.partner
        link = self._link
        if link is not None and not link.stream.is_for(partner):
            link.close()
            self._link = link = None
            if journal is not None:
                self._send_settled()
        if partner is None or serving is None or journal is None:
            return  # the job specification holds that a backup has a journal to store
        if link is not None:
            link.stream.follow(serving.order)
        else:
            self._link = Link(
                Stream(serving.order, self._around.identity, journal, self._around.lines), self._around.connect
            )

    def fail(self, order: PartOrder, why: str) -> None:
        """This shard cannot serve the order's job, and says so."""
        self._failure = order.job, why

    def drop_journal(self) -> None:
        """The job is over, or this process is, or another one is primary. What is not settled is not acknowledged."""
        journal = self._journal
        try:
            if journal is not None and journal.commit():
                self._send_settled()
        finally:
            self._journal = None
            if self._link is not None:
                self._link.close()
                self._link = None
            if journal is not None:
                journal.close()
        self._held.clear()
        self._held_bytes = 0
        if self._preparation is not None:
            self._preparation.abandon()
            self._preparation = None

    def begin(self) -> None:
        """Go on with what the core serves already, and its partner."""
        self._follow_partner()

    def _become(self, order: PartOrder | None) -> None:
        self._reply(self.core.take_order(order))
        self._checkpoint.follow(self.core.serving)
        if self.core.serving is not self._told:
            self._told = self.core.serving
            self._bytes_in = self._bytes_out = 0
            if self._told is None:
                log("job-dropped", part=self.name)
            else:
                order = self._told.order
                log("job-taken", job=order.job, part=self.name, term=order.term, blocks=len(order.blocks))

    # ------------------------------------------------------------------------ checkpoints

    def errands(self, shard: str, incarnation: int, now: float) -> list[Errand]:
        """What is due on the control channel: pieces of a checkpoint, and questions for blocks of one."""
        return self._checkpoint.due(self.core.serving, shard, incarnation, now)

    def hear(self, message: CheckpointStored | KeptBlock, frames: Sequence[memoryview]) -> bool:
        """The coordinator's answer. Returns whether it should hear of what came of it at once."""
        return self._checkpoint.hear(self.core.serving, message, frames)

    # ----------------------------------------------------------------------------- report

    def report(self) -> PartReport | None:
        """The counters of a heartbeat; None where nothing is held and nothing has failed."""
        serving = self.core.serving
        if serving is None:
            job, failed = self._failure
            return PartReport(part=self.name, job=job, failed=failed[:MOST_TEXT]) if job else None
        telemetry, publishing, journal = serving.telemetry, serving.publishing, self._journal
        stream = None if self._link is None else self._link.stream
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
            refusals=dict(self.core.refusals + self.ignored),
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
            stored=0 if stream is None else stream.stored,
            is_synced=stream is not None and stream.is_synced,
            partner="" if stream is None else stream.partner.shard,
            partner_incarnation=0 if stream is None else stream.partner.incarnation,
            partner_number=0 if stream is None else stream.partner.number,
            waiting_for="" if stream is None else stream.waiting_for(self._around.clock())[:MOST_TEXT],
            checkpoint=self._checkpoint.number,
            failed=self._checkpoint.failure[:MOST_TEXT],
        )
