"""The transport seam: what every other room knows of the network. No socket library is imported here.

A *listener* is the bound side (shard, coordinator): it hears many peers and answers each by its `Peer`.
A *channel* is the connected side (worker, and every process towards the coordinator): one remote.
Both are used from one thread only, and neither blocks for longer than the timeout it is given. Messages that go
through a socket arrive in order, and so do those past it (see `memory`), but either may overtake the other.

Buffers. Frames given to `send` are not copied when they are large: they may not change until the
returned `Sending` is done. Frames that `receive` returns are read-only views that keep their memory
alive, but they hold the message only until the next `receive` of the same endpoint: apply them and drop
them. Where a peer shares memory with us (`memory`), frames that are written there are sent without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from paramserver.protocol.messages import Message

Buffer = bytes | bytearray | memoryview
Bytes = npt.NDArray[np.uint8]
Peer = bytes  # a listener's name for one connection; opaque, and new after a peer restarts

MAX_MESSAGE_BYTES = 8 * 2**20  # heads and frames together; senders cut at about half of it
ZERO_COPY_BYTES = 64 * 2**10  # from this size up a frame is sent without a copy


class TransportError(Exception):
    """Ours: an address that cannot be bound or connected to. The text says which, why and how to mend it."""


class Sending(Protocol):
    """Whether the transport has let go of the frames of one send."""

    @property
    def done(self) -> bool: ...


class Sent:
    """A send whose frames were copied: its buffers are free at once."""

    done = True


SENT = Sent()


class FrameMemory(Protocol):
    """Memory that a peer reads as well, with room for the frames of a few messages to it."""

    def place(self, size: int) -> Bytes | None:
        """A buffer (size,) to write a frame in, the caller's until `free`; None where there is no room now."""
        ...

    def free(self, frame: Bytes) -> None:
        """The frame is not needed any more, here; a peer that it was sent to keeps what it reads."""
        ...


@dataclass(frozen=True, slots=True)
class Received:
    """A well-formed message. `frames` are valid until the next receive; `message_bytes` counts head and frames."""

    peer: Peer
    message: Message
    frames: tuple[memoryview, ...]
    message_bytes: int


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes from a peer that are no message. The receiver counts them and answers with a Refusal."""

    peer: Peer
    reason: str
    message_bytes: int


class Listener(Protocol):
    @property
    def address(self) -> str:
        """The bound address, with the port that was really taken."""
        ...

    @property
    def handshake_failures(self) -> int:
        """Connections that died in the transport's own handshake."""
        ...

    @property
    def dropped(self) -> int:
        """Messages that were not sent: their peer is gone, or has left too much unread."""
        ...

    def limit_unread(self, limit_bytes: int) -> None:
        """What one peer may leave unread in bytes; a peer that leaves more gets nothing until it has read some."""
        ...

    def send(self, peer: Peer, message: Message, frames: Sequence[Buffer] = ()) -> Sending:
        """Queue a message for a peer. A peer that is gone, or whose queue is full, drops it: peers retry."""
        ...

    def memory(self, peer: Peer) -> FrameMemory | None:
        """Where frames to this peer are best written; None where it shares no memory with us."""
        ...

    def key_of(self, peer: Peer) -> str:
        """The public key that the other end of this connection has proven to hold; empty where keys are not used.

        What is called by this Peer holds this key, also after it has reconnected.
        """
        ...

    def is_there(self, peer: Peer) -> bool:
        """Whether the connection that is named so still exists. Costs a small message to it."""
        ...

    def receive(self, timeout_seconds: float) -> Received | Malformed | None:
        """The next message, or None when the time is over."""
        ...

    def close(self) -> None: ...


class Channel(Protocol):
    @property
    def address(self) -> str: ...

    @property
    def reconnections(self) -> int: ...

    @property
    def sent_bytes(self) -> int:
        """Of all messages that `send` was given so far, heads included."""
        ...

    def send(self, message: Message, frames: Sequence[Buffer] = ()) -> Sending:
        """Queue a message for the remote; it waits in the queue while the remote is away."""
        ...

    def memory(self) -> FrameMemory | None:
        """Where frames to the remote are best written; None where it shares no memory with us."""
        ...

    def receive(self, timeout_seconds: float) -> Received | Malformed | None: ...

    def reset(self) -> None:
        """Drop the connection with everything queued in it and connect afresh, as a new Peer."""
        ...

    def close(self) -> None: ...


Endpoint = Listener | Channel


class Transport(Protocol):
    """Makes listeners and channels; one for each process (or, in memory, one for each simulated network)."""

    def listen(self, address: str) -> Listener:
        """Bind, for example "tcp://127.0.0.1:0". Raises TransportError (address in use, not an address)."""
        ...

    def connect(self, address: str, key: str = "") -> Channel:
        """Connect to a listener; it need not be there yet. Raises TransportError when it is no address.

        `key` is the listener's public key, empty where keys are not used.
        """
        ...

    def wait(self, endpoints: Sequence[Endpoint], timeout_seconds: float) -> list[Endpoint]:
        """Those (listeners too) that have something to receive, waiting at most so long for the first."""
        ...

    def close(self) -> None: ...
