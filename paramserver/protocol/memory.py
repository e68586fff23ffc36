"""The transport in one process, with a virtual clock and seeded faults: what simulations and core tests run on.

Nothing sleeps and nothing is random beyond the seed: the same calls give the same deliveries. Messages are
really encoded and decoded, and a large frame is read only when it is delivered, so a sender that changes
a buffer too early is found out here as it would be on the wire.

The clock moves in two ways: `advance(seconds)`, and a receive or wait with a timeout, which moves it to the
next delivery or to the end of the timeout. While somebody waits, `network.idle` is called (once at first and
after every step of the clock): a test sets it to let the other processes of the simulation work.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from paramserver.protocol.framing import FramingError, decode_message, encode_message
from paramserver.protocol.messages import Message
from paramserver.protocol.transport import (
    SENT,
    ZERO_COPY_BYTES,
    Buffer,
    Endpoint,
    Malformed,
    Peer,
    Received,
    Sending,
    TransportError,
)

OVERTAKING_SECONDS = 0.01  # how long a reordered message is held back, at least, so that others pass it


@dataclass(frozen=True, slots=True)
class Faults:
    """What the network has done so far, in messages."""

    delivered: int = 0
    dropped: int = 0
    duplicated: int = 0
    overtaken: int = 0  # delivered after a message that was sent later on the same link
    cut_off: int = 0  # lost because the address was cut
    unreachable: int = 0  # lost because the receiver was gone


class MemoryNetwork:
    """A Transport. Addresses are any text; one that ends in ":0" gets a free number. Single-threaded.

    Args:
        seed: of all faults.
        drop, duplicate, reorder: probability of each fault, a message, in both directions.
        delay: bounds in seconds of the (uniform) time a message travels. Without `reorder` a link keeps order.
        bytes_a_second: what each link carries, each way of a connection by itself; a message arrives when its last
            byte does.
    """

    def __init__(
        self,
        seed: int,
        drop: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        delay: tuple[float, float] = (0.0, 0.0),
        bytes_a_second: float = inf,
    ) -> None:
        if not all(0 <= chance <= 1 for chance in (drop, duplicate, reorder)):
            raise ValueError(f"drop {drop}, duplicate {duplicate}, reorder {reorder}: a probability is from 0 to 1")
        if not 0 <= delay[0] <= delay[1]:
            raise ValueError(f"delay {delay}: it is (shortest, longest) in seconds, from 0 up")
        if not bytes_a_second > 0:
            raise ValueError(f"bytes_a_second {bytes_a_second}: nothing would ever arrive")
        self.drop, self.duplicate, self.reorder, self.delay = drop, duplicate, reorder, delay
        self.bytes_a_second = bytes_a_second
        self.now = 0.0
        """The virtual time in seconds."""
        self.faults = Faults()
        self.idle: Callable[[], None] | None = None
        self._random = random.Random(seed)
        self._numbers = itertools.count(1)
        self._order = itertools.count()
        self._travelling: list[tuple[float, int, _Parcel]] = []
        self._listeners: dict[str, MemoryListener] = {}
        self._channels: list[MemoryChannel] = []
        self._cut: set[str] = set()
        self._is_idling = False

    def listen(self, address: str) -> MemoryListener:
        """Take the address; what channels queued for it starts to travel. Raises TransportError when it is in use."""
        if address.endswith(":0"):
            address = f"{address[:-1]}{40000 + next(self._numbers)}"
        if address in self._listeners:
            raise TransportError(f"cannot listen on {address!r}: the address is in use; close its listener first")
        listener = self._listeners[address] = MemoryListener(self, address)
        for channel in self._channels:
            if channel.address == address:
                channel._establish()
        return listener

    def connect(self, address: str, key: str = "") -> MemoryChannel:
        """Connect to a listener; it need not be there yet. Keys are not used in memory."""
        channel = MemoryChannel(self, address)
        self._channels.append(channel)
        if address in self._listeners:
            channel._establish()
        return channel

    def wait(self, endpoints: Sequence[Endpoint], timeout_seconds: float) -> list[Endpoint]:
        """The endpoints that have something to receive; moves the clock, never sleeps."""

        def ready() -> list[Endpoint]:
            return [end for end in endpoints if isinstance(end, _MemoryEndpoint) and end._inbox]

        self._wait(lambda: bool(ready()), timeout_seconds)
        return ready()

    def close(self) -> None:
        for channel in list(self._channels):
            channel.close()
        for listener in list(self._listeners.values()):
            listener.close()

    def advance(self, seconds: float) -> None:
        """Let virtual time pass and deliver what arrives meanwhile."""
        self._move(self.now + seconds)

    def cut(self, address: str) -> None:
        """From now on whatever is sent to or from the listener of this address, or is on its way, is lost."""
        self._cut.add(address)

    def heal(self, address: str) -> None:
        self._cut.discard(address)

    def _send(self, link: _Link, parts: Sequence[Buffer]) -> Sending:
        """Roll the dice for one message and put its copies on their way."""
        roll = self._random.random
        # All are rolled for every message, so that one fault's probability does not shift the others' dice.
        lost, twice, held_back = roll() < self.drop, roll() < self.duplicate, roll() < self.reorder
        parcel = _Parcel(link, next(link.numbers), parts)
        if link.address in self._cut:
            self._count("cut_off")
            return SENT
        if lost:
            self._count("dropped")
            return SENT
        if twice:
            self._count("duplicated")
        link.free_at = max(self.now, link.free_at) + sum(map(len, parts)) / self.bytes_a_second
        copies = 2 if twice else 1
        parcel.copies_left = copies
        for copy in range(copies):
            at = link.free_at + self._random.uniform(*self.delay)
            if held_back and not copy:
                at += self._random.uniform(1.0, 2.0) * max(OVERTAKING_SECONDS, self.delay[1])
            else:
                link.last_arrival = at = max(at, link.last_arrival)
            heapq.heappush(self._travelling, (at, next(self._order), parcel))
        return parcel if parcel.has_views else SENT

    def _move(self, until: float) -> None:
        while self._travelling and self._travelling[0][0] <= until:
            at, _, parcel = heapq.heappop(self._travelling)
            self.now = max(self.now, at)
            self._deliver(parcel)
        self.now = max(self.now, until)

    def _deliver(self, parcel: _Parcel) -> None:
        link = parcel.link
        buffers = parcel.unpack()
        if link.address in self._cut:
            self._count("cut_off")
            return
        receiver = link.receiver
        if receiver is None or receiver._closed:
            self._count("unreachable")
            return
        self._count("delivered")
        if parcel.number < link.highest_delivered:
            self._count("overtaken")
        link.highest_delivered = max(link.highest_delivered, parcel.number)
        message_bytes = sum(map(len, buffers))
        try:
            message, frames = decode_message(buffers)
        except FramingError as error:
            receiver._inbox.append(Malformed(link.peer, error.reason, message_bytes))
        else:
            receiver._inbox.append(Received(link.peer, message, frames, message_bytes))

    def _wait(self, is_over: Callable[[], bool], timeout_seconds: float) -> None:
        deadline = self.now + max(0.0, timeout_seconds)
        self._move(self.now)
        while not is_over():
            # A process that waits inside `idle` would wait for itself: there, nothing but now is looked at.
            if timeout_seconds <= 0 or self._is_idling:
                return
            self._let_others_work()
            self._move(self.now)
            if is_over() or self.now >= deadline:
                return
            arrival = self._travelling[0][0] if self._travelling else deadline
            self._move(min(max(arrival, self.now), deadline))

    def _let_others_work(self) -> None:
        if self.idle is None:
            return
        self._is_idling = True
        try:
            self.idle()
        finally:
            self._is_idling = False

    def _count(self, fault: str) -> None:
        self.faults = replace(self.faults, **{fault: getattr(self.faults, fault) + 1})


@dataclass(slots=True)
class _Link:
    """One direction of one connection. `peer` is the sender's name as the receiver sees it."""

    address: str  # of the listener, whichever way the link goes
    receiver: _MemoryEndpoint | None
    peer: Peer
    last_arrival: float = 0.0
    free_at: float = 0.0  # when its last message so far has left
    highest_delivered: int = 0
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))


class _Parcel:
    """One message on its way; it is also the `Sending` of its sender."""

    def __init__(self, link: _Link, number: int, parts: Sequence[Buffer]) -> None:
        self.link = link
        self.number = number
        self.copies_left = 0
        # Small frames are copied now and large ones when they are delivered, as ZeroMQ does.
        self._parts = [bytes(part) if len(part) < ZERO_COPY_BYTES else part for part in parts]
        self.has_views = any(len(part) >= ZERO_COPY_BYTES for part in parts)

    @property
    def done(self) -> bool:
        return self.copies_left == 0

    def unpack(self) -> list[bytes]:
        self.copies_left -= 1
        return [bytes(part) for part in self._parts]


class _MemoryEndpoint:
    def __init__(self, network: MemoryNetwork, address: str) -> None:
        self._network = network
        self._address = address
        self._inbox: deque[Received | Malformed] = deque()
        self._closed = False

    @property
    def address(self) -> str:
        return self._address

    def receive(self, timeout_seconds: float) -> Received | Malformed | None:
        """The next message, or None when the (virtual) time is over; 0 leaves the clock alone."""
        if not self._inbox:
            self._network._wait(lambda: bool(self._inbox), timeout_seconds)
        return self._inbox.popleft() if self._inbox else None

    def _must_be_open(self) -> None:
        if self._closed:
            raise TransportError(f"{self._address!r} is closed; nothing can be sent")


class MemoryListener(_MemoryEndpoint):
    """The bound side. Made by `MemoryNetwork.listen`."""

    handshake_failures = 0  # there is no handshake in memory
    dropped = 0  # see Faults

    def limit_unread(self, limit_bytes: int) -> None:
        """Links in memory have no queue that a peer could leave unread."""

    def __init__(self, network: MemoryNetwork, address: str) -> None:
        super().__init__(network, address)
        self._links: dict[Peer, _Link] = {}

    def memory(self, peer: Peer) -> None:
        """Simulated machines share none."""

    def send(self, peer: Peer, message: Message, frames: Sequence[Buffer] = ()) -> Sending:
        """Send to a peer; one that is gone is counted in `faults.unreachable`."""
        self._must_be_open()
        parts = encode_message(message, frames)
        link = self._links.get(peer)
        if link is None:
            self._network._count("unreachable")
            return SENT
        return self._network._send(link, parts)

    def key_of(self, peer: Peer) -> str:
        return ""

    def is_there(self, peer: Peer) -> bool:
        return peer in self._links

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            del self._network._listeners[self._address]


class MemoryChannel(_MemoryEndpoint):
    """The connected side. Made by `MemoryNetwork.connect`."""

    def __init__(self, network: MemoryNetwork, address: str) -> None:
        super().__init__(network, address)
        self._established = 0
        self.sent_bytes = 0
        self._uplink: _Link | None = None
        self._downlink: _Link | None = None
        self._queue: list[_Queued] = []

    @property
    def reconnections(self) -> int:
        """How often the connection was established after the first time."""
        return max(0, self._established - 1)

    def memory(self) -> None:
        """Simulated machines share none."""

    def send(self, message: Message, frames: Sequence[Buffer] = ()) -> Sending:
        """Send, or queue while no listener has the address."""
        parts = encode_message(message, frames)
        self.sent_bytes += sum(map(len, parts))
        return self.send_buffers(parts)

    def send_buffers(self, parts: Sequence[Buffer]) -> Sending:
        """Send raw bytes, as a peer of another make would: to test what a receiver does with them."""
        self._must_be_open()
        listener = self._network._listeners.get(self._address)
        if listener is None or self._uplink is None:
            queued = _Queued(parts)
            self._queue.append(queued)
            return queued
        return self._network._send(self._uplink, parts)

    def reset(self) -> None:
        """Drop the connection with everything on its way and connect afresh, as a new Peer."""
        self._drop()
        if self._address in self._network._listeners:
            self._establish()

    def close(self) -> None:
        if not self._closed:
            # What is on its way still arrives: a goodbye must leave.
            self._forget_peer()
            self._closed = True
            self._network._channels.remove(self)

    def _establish(self) -> None:
        """A listener has the address: become a new peer of it and send what was queued."""
        listener = self._network._listeners[self._address]
        self._forget_peer()
        peer = f"peer-{next(self._network._numbers)}".encode()
        self._uplink = _Link(self._address, listener, peer)
        self._downlink = listener._links[peer] = _Link(self._address, self, b"")
        self._established += 1
        queue, self._queue = self._queue, []
        for queued in queue:
            queued.sending = self._network._send(self._uplink, queued.parts)

    def _drop(self) -> None:
        for link in (self._uplink, self._downlink):
            if link is not None:
                link.receiver = None
        self._forget_peer()
        for queued in self._queue:
            queued.sending = SENT
        self._queue.clear()
        self._inbox.clear()

    def _forget_peer(self) -> None:
        listener = self._network._listeners.get(self._address)
        if listener is not None and self._uplink is not None:
            listener._links.pop(self._uplink.peer, None)
        self._uplink = self._downlink = None


@dataclass(slots=True)
class _Queued:
    """A message that waits for its listener; its buffers are in use until it travelled."""

    parts: Sequence[Buffer]
    sending: Sending | None = None

    @property
    def done(self) -> bool:
        return self.sending is not None and self.sending.done
