"""A part in the role of backup: takes its primary's journal, and becomes the primary when the coordinator says so.

Only the partner that the order names may replicate, and nobody under an older term than the order's: a primary that was
stopped and comes back after another was promoted gets a refusal instead of "stored", so it acknowledges nothing. What
the coordinator may promote (`partner.is_synced`) is never given up for another line.
"""

from __future__ import annotations

from collections import Counter

from paramserver.process import log
from paramserver.protocol.messages import (
    PartOrder,
    PartReport,
    Refusal,
    RefusalCode,
    Replicate,
    Stored,
)
from paramserver.protocol.transport import Peer, Received
from paramserver.shard.journal.keeper import ShardJournal
from paramserver.shard.journal.layout import JournalError
from paramserver.shard.preparation import Preparation
from paramserver.shard.replication.store import OtherBuildError, Store
from paramserver.shard.serving import Serving
from paramserver.shard.surroundings import Surroundings

APPLY_SECONDS = 0.002  # in a row, while nothing else is to be done
MOST_TEXT = 4096


class Standby:
    """Belongs to the loop's thread.

    Args:
        order: whose role is "backup".
        around: what it shares with the other parts of the shard.
    """

    def __init__(self, order: PartOrder, around: Surroundings) -> None:
        self.order = order
        self.refusals: Counter[str] = Counter()
        self._around = around
        self._listener = around.listener
        self._store: Store | None = None
        self._failed = ""
        self._bytes_in = 0
        self._asked: dict[Peer, int] = {}  # who waits for an answer, and their last question
        self._last: tuple[Peer, int] | None = None  # who asked last, and what
        self._told_record = 0
        self._preparation: Preparation | None = around.prepare(order, around.home)

    @property
    def name(self) -> str:
        return self.order.part

    @property
    def is_preparing(self) -> bool:
        """Whether the end of something in another thread should be seen soon."""
        store = self._store
        return self._preparation is not None or (store is not None and store.is_restoring)

    @property
    def trouble(self) -> str:
        """Why records cannot be written now; empty where all is well."""
        return "" if self._store is None else self._store.trouble

    @property
    def has_pending(self) -> bool:
        """Whether records wait to be applied."""
        return self._store is not None and self._store.has_pending

    def follow(self, order: PartOrder) -> None:
        """A newer order of the same job, role and part."""
        if order.term >= self.order.term:
            self.order = order

    # --------------------------------------------------------------------------- messages

    def handle(self, received: Received, message: Replicate) -> Refusal | None:
        """Take a piece. Returns a refusal, which is sent; what is taken is answered after the commit."""
        self._bytes_in += received.message_bytes
        refused = self._judge(received.peer, message)
        if refused is None and self._store is not None:
            refused = self._take(self._store, message, received.frames[0], self._around.clock())
            if refused is None:
                self._asked[received.peer] = max(message.ask, self._asked.get(received.peer, 0))
        if refused is None:
            return None
        code, detail = refused
        self.refusals[code] += 1
        refusal = Refusal(code=code, detail=detail[:MOST_TEXT])
        self._listener.send(received.peer, refusal)
        return refusal

    def _judge(self, peer: Peer, message: Replicate) -> tuple[RefusalCode, str] | None:
        order = self.order
        partner = order.partner
        if message.job != order.job:
            return "wrong-job", f"found job {message.job!r}, this shard backs up {order.job!r}"
        if message.term < order.term:
            return "wrong-term", f"found placement term {message.term}, this backup has heard of {order.term}"
        if partner is None or (message.shard, message.incarnation) != (partner.shard, partner.incarnation):
            wanted = "nobody" if partner is None else f"{partner.shard} of incarnation {partner.incarnation}"
            return "wrong-term", f"{message.shard} of incarnation {message.incarnation} replicates, ordered is {wanted}"
        key = self._listener.key_of(peer)
        if key and key != partner.key:
            return "wrong-key", f"{message.shard} has key {partner.key}, this connection has proven {key}"
        if self._failed:
            return "other-build", self._failed
        return None

    def _take(self, store: Store, message: Replicate, frame: memoryview, now: float) -> tuple[RefusalCode, str] | None:
        line = message.shard, message.incarnation, message.line
        assert self.order.partner is not None
        try:
            if line != store.line and message.line and message.at == 0 and len(frame):
                if store.line is not None and line[:2] == store.line[:2] and line[2] < store.line[2]:
                    return None  # late: the line that it began was given up
                if self.order.partner.is_synced:
                    return "not-served", "another line would replace what the coordinator may promote"
                store.begin(line)
            if line == store.line and len(frame):
                store.take(message, frame, now)
        except ValueError as error:
            return "corrupt-frame", f"{error}"
        except (OtherBuildError, JournalError) as error:
            self._give_up(store, error)
            return "other-build", self._failed
        except OSError as error:
            log("backup-put-off", level="warning", part=self.name, reason=error)
            store.drop()
        return None

    def _give_up(self, store: Store, error: OtherBuildError | JournalError) -> None:
        """The coordinator may choose another backup; the parts that this process serves must not go with this one."""
        damaged = f"what {self.order.partner.shard if self.order.partner else 'the primary'} sent cannot be used: "
        self._failed = why = f"{damaged if isinstance(error, JournalError) else ''}{error}"
        store.drop()
        log("backup-impossible", level="error", part=self.name, reason=why)

    # ------------------------------------------------------------------------- each turn

    def look_after(self) -> bool:
        """Commit and answer. Returns whether something has changed that the coordinator should hear of at once."""
        if self._preparation is not None:
            return self._look_after_preparation()
        store = self._store
        if store is None:
            return False
        before = store.trouble
        try:
            store.look_after()
        except (OtherBuildError, JournalError) as error:
            self._give_up(store, error)
        except OSError as error:
            log("backup-put-off", level="warning", part=self.name, reason=error)
            store.drop()
        if store.commit():
            self._answer(store)
        if store.trouble != before:
            log("journal", level="error" if store.trouble else "info", part=self.name, state=store.trouble or "writing")
        return store.trouble != before

    def _answer(self, store: Store) -> None:
        """Tell whoever asked, and the primary, unasked, that a snapshot is stored at last."""
        if not self._asked and self._last is not None and store.record != self._told_record:
            self._asked = dict([self._last])
        for peer, ask in self._asked.items():
            self._listener.send(peer, self._stored(store, ask))
            self._last, self._told_record = (peer, ask), store.record
        self._asked = {}

    def _stored(self, store: Store, ask: int) -> Stored:
        line = 0 if store.line is None else store.line[2]
        partner = self.order.partner
        if partner is None or store.line is None or store.line[:2] != (partner.shard, partner.incarnation):
            line = 0
        received, record = (store.received, store.record) if line else (0, 0)
        return Stored(part=self.name, line=line, ask=ask, received=received, record=record)

    def _look_after_preparation(self) -> bool:
        assert self._preparation is not None
        try:
            if not self._preparation.is_over():
                return False
            self._store = Store(self._preparation.take_folder(), self.order, self._around.in_background)
        except JournalError as error:
            self._failed = str(error)
            log("journal-unusable", level="error", job=self.order.job, part=self.name, reason=error)
        self._preparation = None
        return True

    def apply(self, is_idle: bool) -> None:
        """Apply records: for a moment where the loop is idle, else those that have waited for as long as they may."""
        store = self._store
        if store is None:
            return
        clock = self._around.clock
        now = clock()
        until = now + APPLY_SECONDS if is_idle else now
        while store.has_pending and (store.is_overdue(now) or clock() < until):
            store.apply_one()

    # ---------------------------------------------------------------------------- its end

    def promote(self) -> tuple[Serving, ShardJournal] | None:
        """All that is stored, applied, and its journal; None, and all is let go, where there is no whole state."""
        found = self._store.finish() if self._store is not None else None
        if found is None:
            self.close()
        self._store = None
        return found

    def close(self) -> None:
        """Let go of everything; the files stay."""
        if self._preparation is not None:
            self._preparation.abandon()
            self._preparation = None
        store, self._store = self._store, None
        if store is not None:
            store.commit()
            store.close()

    def report(self) -> PartReport:
        """The counters of a heartbeat."""
        store = self._store
        return PartReport(
            part=self.name,
            job=self.order.job,
            term=self.order.term,
            role="backup",
            blocks=len(self.order.blocks),
            elements=sum(self.order.layout.blocks[index].elements for index in self.order.blocks),
            refusals=dict(self.refusals),
            bytes_in=self._bytes_in,
            refusing_disk=self.trouble[:MOST_TEXT],
            failed=self._failed[:MOST_TEXT],
            journal_bytes=0 if store is None else store.written_bytes,
            record=0 if store is None else store.record,
        )
