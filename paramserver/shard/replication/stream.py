"""The primary's side of replication: what to send next, what the backup has, and whether replies must wait for it.

The backup's answers say how many bytes of the line it has, and this side goes on from there: what was lost, repeated or
overtaken on its way needs no other care. When all that was written is on its way, replies begin to wait for the backup;
when it has stored what was written until then, it is *in step*: every acknowledged update is on both. From that moment
on the coordinator may promote it without asking, so this side acknowledges nothing alone any more until an order names
another partner, or none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from paramserver.encoding.base import Bytes
from paramserver.process import log
from paramserver.protocol.messages import Partner, PartOrder, Refusal, Replicate, Stored
from paramserver.shard.journal.keeper import ShardJournal
from paramserver.shard.replication.source import Chunk, LineSource

PIECE_BYTES = 4 * 2**20  # of one message
WINDOW_BYTES = 8 * 2**20  # on their way at most, and at least one piece
NEAR_BYTES = 16 * 2**20  # when so little is missing, replies begin to wait
WINDOW_PIECES = 64  # the transport's queue drops what is beyond 256 messages
ASK_SECONDS = 0.25  # between two questions that are not answered
STALL_SECONDS = 1.0  # without progress: ask, for something may be lost on its way
RESET_ASKS = 8  # unanswered in turn: the connection is taken for dead
TELL_SECONDS = 0.5  # that replies wait is worth telling from then on


@dataclass(frozen=True, slots=True)
class Piece:
    """One message to send. Its frame is `size` bytes of the chunk, from `offset` on; no chunk: it only asks."""

    message: Replicate
    chunk: Chunk | None = None
    offset: int = 0
    size: int = 0


class Stream:
    """What a primary tells one backup process. Belongs to the loop's thread; reads no clock.

    Args:
        order: whose partner this is for.
        identity: (name, incarnation) of this shard process, as it is now.
        journal: of the part.
        lines: numbers of lines, which grow as long as the process lives.
    """

    def __init__(
        self,
        order: PartOrder,
        identity: Callable[[], tuple[str, int]],
        journal: ShardJournal,
        lines: Iterator[int],
    ) -> None:
        assert order.partner is not None
        self._order = order
        self.partner: Partner = order.partner
        self._identity = identity
        self._journal = journal
        self._lines = lines
        self._line = 0
        self._source: LineSource | None = None
        self._chunks: deque[Chunk] = deque()  # of which the backup has not all bytes
        self._sent = 0  # bytes of the line that were sent ...
        self._sending = 0  # ... and the number of chunks that begin before that place
        self._pieces_sent: deque[int] = deque()  # where the pieces end that are on their way
        self._received = 0  # bytes that the backup has
        self._ask = 0
        self._is_asking = True
        self._asked_at = float("-inf")
        self._unanswered = 0
        self._progress_at = 0.0  # when it last told of more, or the first piece left that is on its way
        self._behind_since: float | None = None  # when it was first seen not to have stored everything
        self._waits_from: int | None = None  # the last record that was written when replies began to wait
        self._refusal = ""
        self.stored = 0
        """The last record that the backup has stored."""
        self.is_synced = False
        """The backup has all that was acknowledged. Never taken back: the coordinator may have heard it."""
        self.must_reset = False
        """The connection should be made anew; whoever does so clears this."""

    # ------------------------------------------------------------------------- orders

    def is_for(self, partner: Partner | None) -> bool:
        """Whether an order with this partner goes on with what is here."""
        return partner is not None and _who(partner) == _who(self.partner)

    def follow(self, order: PartOrder) -> None:
        """A newer order that names the same partner process."""
        assert order.partner is not None
        self._order, self.partner = order, order.partner

    @property
    def must_wait(self) -> bool:
        """Whether nothing may be acknowledged that the backup has not stored."""
        return self.is_synced or self.partner.is_synced or self._waits_from is not None

    @property
    def is_busy(self) -> bool:
        """Whether there is something to do when nothing comes: ask, or look whether it has stopped."""
        return self._is_asking or self._line == 0 or self._received < self._sent

    def waiting_for(self, now: float) -> str:
        """What replies have waited for, in words; empty where they need not wait, or not for long."""
        since = self._behind_since
        if not self.must_wait or since is None or now - since < TELL_SECONDS:
            return ""
        return (
            f"{self.partner.shard}, its backup, has stored record {self.stored} of {self._journal.number}"
            f"{': ' + self._refusal if self._refusal else ''}"
        )

    # ------------------------------------------------------------------------- to send

    @property
    def wants_snapshot(self) -> bool:
        """Whether a snapshot should be taken first: the log after the last one is long."""
        return self._wants_line and self._journal.is_long

    @property
    def _wants_line(self) -> bool:
        return not self._is_asking and self._line == 0

    def pieces(self, now: float) -> Iterator[Piece]:
        """What to send now, each before the next one is asked for. Raises OSError where a file cannot be read."""
        if self.stored >= self._journal.number:
            self._behind_since = None
        elif self._behind_since is None:
            self._behind_since = now
        if self._source is not None and not self.must_wait and self._source.lag_bytes > self._journal.most_lag_bytes:
            self._give_up_line()
        if self._is_asking:
            if now - self._asked_at >= ASK_SECONDS:
                yield self._question(now)
            return
        if self._wants_line and not self._begin_line(now):
            return
        while (piece := self._next_piece(now)) is not None:
            yield piece
        self._begin_to_wait()
        if self._received < self._sent and now - self._progress_at >= STALL_SECONDS:
            yield self._question(now)

    def _question(self, now: float) -> Piece:
        self._ask += 1
        self._asked_at = now
        self._unanswered += 1
        self._is_asking = True
        if self._unanswered > RESET_ASKS:
            self.must_reset, self._unanswered = True, 0
        if not self.is_synced and self._unanswered > 1:
            self._waits_from = None  # nobody was told that it is in step: nobody need wait for it
        return Piece(self._message())

    def _message(self, chunk: Chunk | None = None, at: int = 0) -> Replicate:
        shard, incarnation = self._identity()
        return Replicate(
            part=self._order.part,
            job=self._order.job,
            term=self._order.term,
            shard=shard,
            incarnation=incarnation,
            line=self._line,
            ask=self._ask,
            at=at,
            kind="records" if chunk is None else chunk.kind,
            begin=0 if chunk is None else chunk.begin,
            chunk_bytes=0 if chunk is None else chunk.size,
            record=0 if chunk is None else chunk.record,
        )

    def _begin_line(self, now: float) -> bool:
        """Begin anew, from the newest snapshot; False where that must wait."""
        journal = self._journal
        if journal.is_sealing or (journal.is_long and journal.may_snapshot):
            return False  # a snapshot is on its way, or is taken after the next commit
        self._close_source()
        self._line = next(self._lines)
        self._source = LineSource(journal)
        self._chunks.clear()
        self._pieces_sent.clear()
        self._sent = self._sending = self._received = self.stored = 0
        self._progress_at = now
        log("backup-catching-up", part=self._order.part, backup=self.partner.shard, record=journal.number)
        return True

    def _next_piece(self, now: float) -> Piece | None:
        on_their_way = self._sent - self._received
        if self._source is None or (
            on_their_way and (on_their_way >= WINDOW_BYTES or len(self._pieces_sent) >= WINDOW_PIECES)
        ):
            return None
        while self._sending < len(self._chunks) and self._chunks[self._sending].end <= self._sent:
            self._sending += 1
        if self._sending == len(self._chunks):
            chunk = self._source.next()
            if chunk is None:
                return None
            self._chunks.append(chunk)
        chunk = self._chunks[self._sending]
        at, offset = self._sent, self._sent - chunk.begin
        size = min(PIECE_BYTES, chunk.size - offset)
        if not on_their_way:
            self._progress_at = now
        self._sent += size
        self._pieces_sent.append(self._sent)
        return Piece(self._message(chunk, at), chunk, offset, size)

    def read(self, piece: Piece, buffer: Bytes) -> None:
        """Fill the buffer with the piece's bytes. Raises OSError."""
        assert self._source is not None
        assert piece.chunk is not None
        self._source.read(piece.chunk, piece.offset, buffer)

    def _begin_to_wait(self) -> None:
        """Let replies wait when little is missing: a backup would never catch up with workers who need not wait.

        Not before it has stored the snapshot: making that durable and reading it may take seconds.
        """
        source = self._source
        if self._waits_from is not None or source is None or not source.is_of_records or not self.stored:
            return
        if source.lag_bytes + self._end_of_chunks - self._received <= NEAR_BYTES:
            self._waits_from = self._journal.number
            self._note_step()

    def _give_up_line(self) -> None:
        """The journal need not keep for it what it would else remove."""
        self._close_source()
        self._line = 0
        self._is_asking = True
        log("backup-too-far-behind", level="warning", part=self._order.part, backup=self.partner.shard)

    @property
    def _end_of_chunks(self) -> int:
        return self._chunks[-1].end if self._chunks else self._sent

    # ------------------------------------------------------------------------- to hear

    def hear(self, message: Stored, now: float) -> None:
        """What the backup has."""
        is_answer = message.ask == self._ask
        if message.ask > self._ask or (not is_answer and self._is_asking):
            return  # of another life, or overtaken by our question
        self._unanswered, self._refusal = 0, ""
        if message.line != self._line or self._line == 0:
            if is_answer and self._is_asking:
                self._begin_anew()
            return
        if message.received > self._received or message.record > self.stored:
            self._progress_at = now
        self.stored = max(self.stored, message.record)
        self._take_received(message.received)
        if self._is_asking and is_answer:
            self._is_asking = False
            # Whatever was sent before the question has arrived, or is lost; of a chunk that it refused, all must come.
            if self._chunks and self._chunks[0].begin <= message.received < self._received:
                self._received = message.received
            self._sent, self._sending = self._received, 0
            self._pieces_sent.clear()
        self._note_step()

    def _begin_anew(self) -> None:
        """The backup has nothing of this line."""
        if self.is_synced or self.partner.is_synced:
            # It may be promoted at any moment: it must not lose what it has, and nobody may go on without it.
            self._refusal = "it does not have what it had stored; the coordinator must order what to do"
            return
        self._line = 0
        self._is_asking = False
        self._waits_from = None
        self._close_source()

    def _take_received(self, received: int) -> None:
        if not self._received < received <= self._end_of_chunks:
            return
        self._received = received
        while self._pieces_sent and self._pieces_sent[0] <= received:
            self._pieces_sent.popleft()
        while self._chunks and self._chunks[0].end <= received:
            chunk = self._chunks.popleft()
            self._sending = max(0, self._sending - 1)
            if self._source is not None:
                self._source.passed(chunk)
        if self._sent < received:
            self._sent = received  # it was sent before the place that we went back to

    def refused(self, refusal: Refusal, now: float) -> None:
        """It takes nothing of us now: it has not got its order yet, or a newer one than ours."""
        if not self._is_asking:
            self._asked_at = now
        self._is_asking, self._unanswered = True, 0
        self._refusal = f"{refusal.code}: {refusal.detail}"

    def _note_step(self) -> None:
        if not self.is_synced and self._waits_from is not None and self.stored >= self._waits_from:
            self.is_synced = True
            log("backup-in-step", part=self._order.part, backup=self.partner.shard, record=self.stored)

    def connect_anew(self) -> None:
        """The connection was made anew: ask before anything else."""
        self._is_asking, self._asked_at = True, float("-inf")

    def close(self) -> None:
        """Nothing more is sent."""
        self._close_source()

    def _close_source(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None


def _who(partner: Partner) -> tuple[str, int, int]:
    return partner.shard, partner.incarnation, partner.number
