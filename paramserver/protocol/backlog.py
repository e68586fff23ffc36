"""Bytes on their way to each peer: what a peer does not read must not pile up here. No I/O, no clock.

The transport's own queue counts messages, and one may have megabytes. Frames that it has copied, and those in shared
memory, are bounded by that queue and by the ring; here are the large ones, until the transport lets go of them.
"""

from __future__ import annotations

from paramserver.protocol.transport import Peer, Sending

UNREAD_BYTES = 64 * 2**20  # to one peer, at the least
SWEEP_PEERS = 64  # from so many peers on, those that have read everything are looked for when their number doubles


class Backlog:
    """Call from one thread only. `limit_bytes` is what one peer may leave unread."""

    def __init__(self, limit_bytes: int = UNREAD_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._unread: dict[Peer, list[tuple[Sending, int]]] = {}
        self._bytes: dict[Peer, int] = {}
        self._sweep_at = SWEEP_PEERS

    def add(self, peer: Peer, sending: Sending, size: int) -> None:
        """So many bytes were queued for the peer; nothing happens where the transport has let go of them already."""
        if sending.done:
            return
        if peer not in self._unread and len(self._unread) >= self._sweep_at:
            self._sweep()
        self._unread.setdefault(peer, []).append((sending, size))
        self._bytes[peer] = self._bytes.get(peer, 0) + size

    def is_full(self, peer: Peer) -> bool:
        """Whether the peer should get nothing more before it has read some."""
        if self._bytes.get(peer, 0) < self.limit_bytes:
            return False
        self._prune(peer)
        return self._bytes.get(peer, 0) >= self.limit_bytes

    def unread_bytes(self, peer: Peer) -> int:
        self._prune(peer)
        return self._bytes.get(peer, 0)

    def _prune(self, peer: Peer) -> None:
        unread = [(sending, size) for sending, size in self._unread.get(peer, ()) if not sending.done]
        if unread:
            self._unread[peer], self._bytes[peer] = unread, sum(size for _, size in unread)
        elif peer in self._unread:
            del self._unread[peer], self._bytes[peer]

    def _sweep(self) -> None:
        for peer in list(self._unread):
            self._prune(peer)
        self._sweep_at = max(SWEEP_PEERS, 2 * len(self._unread))
