"""A stream and its connection. What is sent is read from the files into memory that the backup reads, where it can."""

from __future__ import annotations

from collections.abc import Callable

from paramserver.process import log
from paramserver.protocol.buffers import BufferPool
from paramserver.protocol.messages import Partner, Refusal, Stored
from paramserver.protocol.transport import Channel, Received
from paramserver.shard.journal.layout import JournalError
from paramserver.shard.replication.stream import Stream

SMALLEST_BYTES = 512  # of a buffer

Connect = Callable[[str, str], Channel]


class Link:
    """Belongs to the loop's thread.

    Args:
        connect: makes a channel to (address, public key).
    """

    def __init__(self, stream: Stream, connect: Connect) -> None:
        partner: Partner = stream.partner
        self.stream = stream
        self.channel: Channel = connect(partner.address, partner.key)
        self._pool = BufferPool()
        self._told = ""  # the refusal that was logged last

    def receive(self, now: float) -> None:
        """Take in what the backup has said."""
        while (received := self.channel.receive(0)) is not None:
            if not isinstance(received, Received):
                continue  # it is counted by whoever looks at the connection; we ask again
            match received.message:
                case Stored() as stored:
                    self.stream.hear(stored, now)
                case Refusal() as refusal:
                    if refusal.code != self._told:
                        self._told = refusal.code
                        log("replication-refused", level="warning", code=refusal.code, reason=refusal.detail)
                    self.stream.refused(refusal, now)

    def send(self, now: float) -> None:
        """Send what is due."""
        if self.stream.must_reset:
            self.stream.must_reset = False
            self.channel.reset()
            self.stream.connect_anew()
        try:
            for piece in self.stream.pieces(now):
                if piece.chunk is None:
                    self.channel.send(piece.message, [b""])
                    continue
                # Few sizes: the pool keeps buffers by size.
                room = self._pool.take(max(SMALLEST_BYTES, 1 << (piece.size - 1).bit_length()), self.channel.memory())
                buffer = self._pool.trim(room, piece.size)
                self.stream.read(piece, buffer)
                self._pool.give([buffer], [self.channel.send(piece.message, [buffer.data])])
        except (OSError, JournalError) as error:
            # Files of our own journal: what cannot be read now is asked for again, and replies wait meanwhile. Where a
            # record is damaged they need not: memory has what it says, and the next snapshot takes its place.
            log("journal-unreadable", level="error", reason=error)
            self.stream.connect_anew()

    def close(self) -> None:
        self.stream.close()
        self.channel.close()
