"""The transport over ZeroMQ: listeners are ROUTER sockets, channels DEALER. Beside it only curve.py, keys.py use zmq.

Synchronous and polled, one I/O thread, no thread of its own. Frames from ZERO_COPY_BYTES up leave and
arrive without a copy; smaller ones are copied, which is cheaper than tracking them. Between processes of one
machine messages go past the socket, through shared memory, where both ends can (see shared.py).

Bounds. libzmq refuses a frame above MAX_MESSAGE_BYTES before it takes memory for it, and stops reading a
connection whose queue is full. It does not bound how many frames one message has: those past the bound
are freed here, after they arrived. Only peers that may connect at all can do that.
"""

from __future__ import annotations

import errno
import itertools
import math
import re
import socket as sockets
import struct
import time
from collections.abc import Iterator, Sequence
from typing import cast

import zmq

from paramserver.process import log
from paramserver.protocol.backlog import Backlog
from paramserver.protocol.curve import Guard, Options, channel_options, check_exposed, name_with_key, routing_identity
from paramserver.protocol.curve import key_of as key_in
from paramserver.protocol.doorbell import Doorbell
from paramserver.protocol.framing import MAX_FRAMES, FramingError, decode_message, encode_message
from paramserver.protocol.keys import Keys
from paramserver.protocol.messages import Message
from paramserver.protocol.shared import (
    MARK,
    OFFER,
    PROBE,
    SHARED,
    Arena,
    Mapping,
    Offering,
    Ring,
    SharingError,
)
from paramserver.protocol.transport import (
    MAX_MESSAGE_BYTES,
    SENT,
    ZERO_COPY_BYTES,
    Buffer,
    Endpoint,
    FrameMemory,
    Malformed,
    Peer,
    Received,
    Sending,
    TransportError,
)

LINGER_MS = 500  # how long a close waits for the last messages to leave
SEND_QUEUE = 256  # messages to one peer; beyond it they are dropped, and retried by whoever needs them
RECEIVE_QUEUE = 8  # messages from one peer; beyond it the peer is not read: four-megabyte messages add up
HANDSHAKE_MS = 10_000
RECONNECT_MS, RECONNECT_MAX_MS = 50, 1000
KEEPALIVE_IDLE_SECONDS, KEEPALIVE_INTERVAL_SECONDS, KEEPALIVE_PROBES = 10, 5, 3
MAX_SOCKETS = 4096
MONITOR_EVERY = 1024  # receives between two looks at the monitor of a socket that is never idle
SOCKET_EVERY = 8  # messages from doorbells between two looks at the socket beside them
OWN_PARTS = 64  # of the transport itself, taken in a row before the caller gets a look
MAX_WAIT_SECONDS = 86_400.0

_ADDRESS = re.compile(r"tcp://(?P<host>\*|[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?):(?P<port>[0-9]{1,5})")
_GONE = (errno.EAGAIN, errno.EHOSTUNREACH)
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
).value
_REFUSED = (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH).value
_MONITOR_NAMES = itertools.count()
# Plain integers: combining pyzmq's flags makes an object each time, which costs as much as queueing a small message.
_LAST_PART, _MORE_PARTS = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_POLLIN, _EVENTS = int(zmq.POLLIN), int(zmq.EVENTS)
_MARK = bytes([MARK])


class ZeroMQTransport:
    """A zmq context and the endpoints made from it. Use it, and all of them, from one thread.

    Args:
        keys: of this process: every connection is then encrypted, and only listed keys are let in (see curve.py).
        is_insecure: without keys, listen beyond loopback all the same.
    """

    def __init__(self, keys: Keys | None = None, is_insecure: bool = False) -> None:
        self._keys = keys
        self._is_insecure = is_insecure
        self._guard: Guard | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._context.max_sockets = MAX_SOCKETS
        self._endpoints: list[ZeroMQListener | ZeroMQChannel] = []

    def listen(self, address: str) -> ZeroMQListener:
        """Bind "tcp://HOST:PORT"; port 0 takes a free one, host "*" all interfaces. Raises TransportError."""
        if self._keys is not None and self._guard is None:
            self._guard = Guard(self._context, self._keys)
        listener = ZeroMQListener(self._context, address, self._guard, self._is_insecure)
        self._endpoints.append(listener)
        return listener

    def connect(self, address: str, key: str = "") -> ZeroMQChannel:
        """Connect to "tcp://HOST:PORT"; the listener and even its host name may appear later. Raises TransportError.

        `key` is the listener's public key: both ends have keys, or none has.
        """
        channel = ZeroMQChannel(self._context, address, channel_options(self._keys, key, address))
        self._endpoints.append(channel)
        return channel

    def wait(self, endpoints: Sequence[Endpoint], timeout_seconds: float) -> list[Endpoint]:
        """Those of this transport's endpoints that have something to receive, in the order given."""
        ours = [cast("_Socket", endpoint) for endpoint in endpoints]
        ready = _poll(ours, timeout_seconds)
        if not ready:
            for one in ours:
                one.look_at_monitor()
            return []
        return [end for end, one in zip(endpoints, ours, strict=True) if one.is_among(ready)]

    def close(self) -> None:
        """Close every endpoint; waits at most LINGER_MS for their last messages."""
        for endpoint in self._endpoints:
            endpoint.close()
        self._endpoints.clear()
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        self._context.term()


class _Socket:
    """One zmq socket with its monitor: sending and receiving a message in parts."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], kind: int, events: int, options: Options, guard: Guard | None
    ) -> None:
        self._context = context
        self._options = {**_OPTIONS, **options}
        self._guard = guard  # of a listener with keys
        self._kind = kind
        self._events = events
        self._until_look = MONITOR_EVERY
        self._unreleased: tuple[Ring, int] | None = None  # where the frames of the last message are, and their end
        self.is_ready = False  # a poll has just seen that something can be received
        self.bells: dict[int, tuple[Peer, Doorbell]] = {}  # by descriptor: those that share memory with us
        self._ringing: list[int] | None = None  # bells that may have something; None: nobody has looked
        self._is_socket_silent = False  # as of that look
        self._until_socket = SOCKET_EVERY
        self.dropped = 0
        """Messages that were not sent because the peer is gone or its queue is full."""
        self._open()

    def _open(self) -> None:
        try:
            self.socket: zmq.Socket[bytes] = self._context.socket(self._kind)
        except zmq.ZMQError as error:
            raise TransportError(f"no socket can be opened ({error}); close some, or raise `ulimit -n`") from error
        # What zmq.Socket.send comes to once it has looked for the options of socket kinds that we do not use.
        self._put = super(zmq.Socket, self.socket).send
        for option, value in self._options.items():
            self.socket.setsockopt(option, value)
        self._receive_timeout = -1.0  # what the socket was last told, in seconds
        name = f"inproc://monitor-{next(_MONITOR_NAMES)}"
        self.socket.monitor(name, self._events)
        self._monitor: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        # libzmq's I/O thread would block on a full monitor queue, so this one has no limit; it is read
        # whenever the socket is idle, and now and then when it never is.
        self._monitor.setsockopt(zmq.RCVHWM, 0)
        self._monitor.connect(name)

    def _close(self, linger_ms: int) -> None:
        if self.socket.closed:
            return
        self.look_at_monitor()
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close(linger_ms)

    def close(self) -> None:
        """Close; what is still queued has LINGER_MS to leave. Closing twice is allowed."""
        self._close(LINGER_MS)

    def look_at_monitor(self) -> None:
        """Take in what happened to the connections since the last look. Never blocks."""
        self._until_look = MONITOR_EVERY
        if not self.socket.closed:
            for event, value in self._monitor_events():
                self._on_event(event, value)

    def _on_event(self, event: int, value: int) -> None:
        raise NotImplementedError

    def _monitor_events(self) -> Iterator[tuple[int, int]]:
        while cast(int, self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            event, value = struct.unpack("=Hi", self._monitor.recv(zmq.NOBLOCK))
            self._monitor.recv(zmq.NOBLOCK)  # the endpoint
            yield event, value

    def _send_parts(self, first: Buffer, rest: Sequence[Buffer]) -> Sending:
        """Queue all parts or none. The first part decides: zmq takes or refuses a message there."""
        send = self._put
        try:
            send(first, _MORE_PARTS if rest else _LAST_PART)
        except zmq.ZMQError as error:
            if error.errno in _GONE:
                self.dropped += 1
                return SENT
            raise
        trackers: list[zmq.MessageTracker] = []
        cut_off = False
        left = len(rest)
        for part in rest:
            left -= 1
            flags = _MORE_PARTS if left else _LAST_PART
            try:
                if len(part) < ZERO_COPY_BYTES:
                    send(part, flags)
                else:
                    trackers.append(send(part, flags, copy=False, track=True))
            except zmq.ZMQError as error:
                # The connection went in the middle: zmq wants to be given the rest, and drops it.
                if error.errno not in _GONE:
                    raise
                cut_off = True
        self.dropped += cut_off
        if not trackers:
            return SENT
        return trackers[0] if len(trackers) == 1 else zmq.MessageTracker(*trackers)

    @staticmethod
    def _send_shared(arena: Arena, head: Buffer, frames: Sequence[Buffer]) -> bool:
        """Send a message past the socket; False where it does not fit in there now."""
        shared = arena.share(head, frames)
        if shared is None or arena.bell is None or not arena.bell.ring(shared[1]):
            return False
        arena.outgoing.commit(shared[0])
        return True

    def _receive(self, timeout_seconds: float, has_peer: bool) -> Received | Malformed | None:
        if self._unreleased is not None:
            ring, end = self._unreleased
            self._unreleased = None
            ring.release(end)
        self._until_look -= 1
        if self._until_look <= 0:
            self.look_at_monitor()
        for _ in range(OWN_PARTS):  # a peer that sends nothing else may not keep us here
            got = self._next_parts(timeout_seconds, has_peer)
            if got is None:
                break
            peer, parts, message_bytes = got
            if self._guard is not None and not self._guard.lets_speak(peer):
                return Malformed(peer, "the key of this connection has been withdrawn", message_bytes)
            try:
                if len(parts) == 1 and parts[0][:1] == _MARK:
                    shared = self._take_own(peer, bytes(parts[0]))
                    if shared is None:
                        continue  # the transport's own: nothing for the caller
                    parts = shared
                    message_bytes = sum(map(len, parts))
                message, frames = decode_message(parts)
            except (FramingError, SharingError) as error:
                return Malformed(peer, str(error), message_bytes)
            return Received(peer, message, frames, message_bytes)
        if timeout_seconds > 0:
            self.look_at_monitor()  # else it is for `wait`, once nothing comes
        return None

    def _take_own(self, peer: Peer, part: bytes) -> list[Buffer] | None:
        """Take a part that the transport sent to itself; [head, *frames] where it stands for a message."""
        raise NotImplementedError

    def _read_shared(self, arena: Arena, part: bytes) -> list[Buffer]:
        end, parts = arena.read(part)
        self._unreleased = arena.incoming, end
        return parts

    def is_among(self, ready: set[int]) -> bool:
        """Whether one of these descriptors, or sockets by their id, is ours: only that is read until it is empty."""
        self._ringing = [descriptor for descriptor in self.bells if descriptor in ready]
        self.is_ready = id(self.socket) in ready
        self._is_socket_silent = not self.is_ready
        return bool(self._ringing) or self.is_ready

    def _next_parts(self, timeout_seconds: float, has_peer: bool) -> tuple[Peer, list[Buffer], int] | None:
        """The same as `_receive_parts`, of the doorbells and the socket together."""
        if not self.bells:
            return self._receive_parts(timeout_seconds, has_peer)
        give_up_at = time.monotonic() + timeout_seconds if timeout_seconds > 0 else 0.0
        while True:
            self._until_socket -= 1
            if self._until_socket > 0 and (heard := self._hear()) is not None:
                return heard
            is_silent, self._is_socket_silent = self._is_socket_silent, False
            if is_silent and self._until_socket > 0:
                got = None
            else:
                self._until_socket = SOCKET_EVERY  # bells that never stop may not keep the socket waiting
                got = self._receive_parts(0, has_peer) or self._hear()
            if got is not None or timeout_seconds <= 0:
                return got
            left = give_up_at - time.monotonic()
            if left <= 0:
                return None
            self.is_among(_poll([self], left))

    def _hear(self) -> tuple[Peer, list[Buffer], int] | None:
        """What a doorbell brings, the bells in turn; None where none of them has anything."""
        if self._ringing is None:
            self._ringing = list(self.bells)
        while self._ringing:
            descriptor = self._ringing.pop()
            if descriptor not in self.bells:
                continue
            peer, bell = self.bells[descriptor]
            if (packet := bell.hear()) is not None:
                self._ringing.insert(0, descriptor)
                return peer, [packet], len(packet)
            if bell.is_closed:
                self._on_silence(peer)
        self._ringing = None
        return None

    def _on_silence(self, peer: Peer) -> None:
        """The other end of this bell is gone."""
        raise NotImplementedError

    def _receive_parts(self, timeout_seconds: float, has_peer: bool) -> tuple[Peer, list[Buffer], int] | None:
        """(peer, parts, bytes) of the next message, None when the time is over; no parts for an empty message."""
        recv = self.socket.recv
        flags = 0
        if timeout_seconds <= 0:
            # Whoever reads until nothing is left ends here each time, and an exception costs more than the question.
            if not self.is_ready and not cast(int, self.socket.get(_EVENTS)) & _POLLIN:
                return None
            self.is_ready = False
            flags = _LAST_PART
        elif timeout_seconds != self._receive_timeout:
            self._receive_timeout = timeout_seconds
            self.socket.setsockopt(zmq.RCVTIMEO, _ms(timeout_seconds))
        try:
            # One blocking call: a poll before it costs a sixth of a small round trip. After a signal
            # whose handler returns, pyzmq begins it again with the whole timeout.
            frame = recv(flags, copy=False)
        except zmq.Again:
            return None
        peer = b""
        if has_peer:
            # The routing identity is the transport's own: it counts neither as a frame nor as bytes.
            peer = frame.bytes if self._guard is None else name_with_key(frame)
            if not frame.more:
                return peer, [], 0
            frame = recv(_LAST_PART, copy=False)
        parts: list[Buffer] = []
        message_bytes = 0
        while True:
            size = len(frame)
            message_bytes += size
            # Kept until the message is over its bound, so that decoding sees the excess and names it.
            if len(parts) <= MAX_FRAMES + 1 and message_bytes - size <= MAX_MESSAGE_BYTES:
                parts.append(frame.bytes if size < ZERO_COPY_BYTES else frame.buffer.toreadonly())
            if not frame.more:
                break
            frame = recv(_LAST_PART, copy=False)
        return peer, parts, message_bytes


class ZeroMQListener(_Socket):
    """A bound ROUTER. Made by `ZeroMQTransport.listen`."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        guard: Guard | None = None,
        is_insecure: bool = False,
    ) -> None:
        host, port = _parse(address, "listen on", lowest_port=0)
        interface = _interface(host, address)
        if guard is None and not is_insecure:
            check_exposed(interface, address)
        self._handshaking: dict[int, None] = {}  # descriptors of connections that are not yet accepted as peers
        self._failures = 0
        self._announced = False  # the next connection that ends has been counted as a failure
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED
        super().__init__(context, zmq.ROUTER, events, {} if guard is None else guard.listener_options, guard)
        self._mapping = Mapping()
        self._backlog = Backlog()
        self.bells = self._mapping.bells
        # A peer that is gone is an error at once, instead of a message that silently goes nowhere.
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            self.socket.bind(f"tcp://{interface}:{port}")
        except zmq.ZMQError as error:
            self._close(0)
            raise TransportError(_bind_failure(address, error)) from error
        bound = cast(bytes, self.socket.getsockopt(zmq.LAST_ENDPOINT)).decode()
        self._address = f"tcp://{'0.0.0.0' if host == '*' else host}:{bound.rpartition(':')[2].rstrip(chr(0))}"

    @property
    def address(self) -> str:
        return self._address

    @property
    def handshake_failures(self) -> int:
        """Connections that ended before their handshake did: foreign bytes, port scans, refused keys, timeouts."""
        self.look_at_monitor()
        return self._failures

    def limit_unread(self, limit_bytes: int) -> None:
        """What one peer may leave unread in bytes; a peer that leaves more gets nothing until it has read some."""
        self._backlog.limit_bytes = limit_bytes

    def key_of(self, peer: Peer) -> str:
        """The public key that this peer has proven to hold; empty on a listener without keys."""
        return "" if self._guard is None else key_in(peer)

    def _send_parts(self, first: Buffer, rest: Sequence[Buffer]) -> Sending:
        return super()._send_parts(first if self._guard is None else routing_identity(bytes(first)), rest)

    def send(self, peer: Peer, message: Message, frames: Sequence[Buffer] = ()) -> Sending:
        """Queue a message for a peer; one that is gone, or whose queue is full, is dropped and counted."""
        if self._backlog.is_full(peer):
            self.dropped += 1
            return SENT
        head, *rest = encode_message(message, frames)
        arena = self._mapping.of(peer)
        if arena is not None and self._send_shared(arena, head, rest):
            return SENT
        sending = self._send_parts(peer, [head, *rest])
        if sending is not SENT:
            self._backlog.add(peer, sending, len(head) + sum(map(len, rest)))
        return sending

    def memory(self, peer: Peer) -> FrameMemory | None:
        """The ring towards this peer, where it shares one with us."""
        arena = self._mapping.of(peer)
        return None if arena is None else arena.outgoing

    def is_there(self, peer: Peer) -> bool:
        """Whether the connection still exists; a socket tells that only to who sends."""
        if self._mapping.of(peer) is not None:
            return True  # until its bell is closed, which is heard
        try:
            self.socket.send(peer if self._guard is None else routing_identity(peer), zmq.SNDMORE | zmq.NOBLOCK)
            self.socket.send(PROBE, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in _GONE:
                raise
            return error.errno == errno.EAGAIN  # its queue is full
        return True

    def _take_own(self, peer: Peer, part: bytes) -> list[Buffer] | None:
        if part.startswith(OFFER):
            self._send_parts(peer, [self._mapping.answer(peer, part)])
            return None
        if not part.startswith(SHARED):
            raise SharingError("nothing that the transport says to itself")
        arena = self._mapping.of(peer)
        if arena is None:
            raise SharingError("shared frames of a connection that shares no memory")
        return self._read_shared(arena, part)

    def receive(self, timeout_seconds: float) -> Received | Malformed | None:
        """The next message, or None when the time is over; 0 does not block."""
        return self._receive(timeout_seconds, has_peer=True)

    def close(self) -> None:
        """Close; what is still queued has LINGER_MS to leave. Closing twice is allowed."""
        super().close()
        self._mapping.close()

    def _on_silence(self, peer: Peer) -> None:
        self._mapping.forget(peer)

    def _on_event(self, event: int, value: int) -> None:
        # libzmq names the connection (its descriptor) only when it begins and ends. So a success is credited
        # to the oldest that waits, and a wrong guess is put right when connections end. It announces most
        # failures just before the end; those of the ancient ZMTP 1.0 are nothing but an end.
        waiting = self._handshaking
        if event == zmq.EVENT_DISCONNECTED:
            self._mapping.sweep()
        if event == zmq.EVENT_ACCEPTED:
            waiting[value] = None
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._forget_oldest()
        elif event != zmq.EVENT_DISCONNECTED:
            self._failures += 1
            self._announced = True
        elif value in waiting:
            del waiting[value]
            self._failures += not self._announced
            self._announced = False
        elif self._announced:
            self._forget_oldest()
            self._announced = False

    def _forget_oldest(self) -> None:
        if self._handshaking:
            del self._handshaking[next(iter(self._handshaking))]


class ZeroMQChannel(_Socket):
    """A connected DEALER. Made by `ZeroMQTransport.connect`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, options: Options) -> None:
        host, port = _parse(address, "connect to", lowest_port=1)
        if host == "*":
            raise TransportError(f"cannot connect to {address!r}: '*' means all interfaces; name one host")
        self._address = f"tcp://{host}:{port}"
        self._established = 0
        self.sent_bytes = 0
        self._is_refused = False
        self._offering = Offering()
        super().__init__(context, zmq.DEALER, zmq.EVENT_HANDSHAKE_SUCCEEDED | _REFUSED, options, None)
        self._connect()

    @property
    def address(self) -> str:
        return self._address

    @property
    def reconnections(self) -> int:
        """How often the connection was established after the first time."""
        self.look_at_monitor()
        return max(0, self._established - 1)

    def send(self, message: Message, frames: Sequence[Buffer] = ()) -> Sending:
        """Queue a message; SEND_QUEUE of them wait while the remote is away, the next is dropped and counted."""
        head, *rest = encode_message(message, frames)
        frame_bytes = sum(map(len, rest))
        self.sent_bytes += len(head) + frame_bytes
        arena = self._offering.arena
        if arena is not None and self._send_shared(arena, head, rest):
            return SENT
        if (offer := self._offering.due(frame_bytes)) is not None:
            self._send_parts(offer, ())
        return self._send_parts(head, rest)

    def memory(self) -> FrameMemory | None:
        """The ring towards the remote, where it shares one with us."""
        arena = self._offering.arena
        return None if arena is None else arena.outgoing

    def _take_own(self, peer: Peer, part: bytes) -> list[Buffer] | None:
        arena = self._offering.arena
        if part.startswith(SHARED) and arena is not None:
            return self._read_shared(arena, part)
        self._offering.hear(part)
        self._follow_bell()
        return None

    def _on_silence(self, peer: Peer) -> None:
        self._follow_bell()

    def _follow_bell(self) -> None:
        """Listen to the arena that is offered and accepted now, if any."""
        arena = self._offering.arena
        self.bells = {} if arena is None or arena.bell is None else {arena.bell.fileno(): (b"", arena.bell)}

    def receive(self, timeout_seconds: float) -> Received | Malformed | None:
        """The next message, or None when the time is over; 0 does not block."""
        return self._receive(timeout_seconds, has_peer=False)

    def close(self) -> None:
        """Close; what is still queued has LINGER_MS to leave. Closing twice is allowed."""
        super().close()
        self._abandon()

    def reset(self) -> None:
        """Drop the connection with everything queued in it and connect afresh, as a new Peer."""
        self._close(0)
        self._abandon()
        self._open()
        self._connect()

    def _abandon(self) -> None:
        self._offering.abandon()
        self._follow_bell()

    def _connect(self) -> None:
        try:
            self.socket.connect(self._address)
        except zmq.ZMQError as error:
            self._close(0)
            raise TransportError(f"cannot connect to {self._address!r}: {error}") from error

    def _on_event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._established += 1
            self._is_refused = False
        elif not self._is_refused:
            self._is_refused = True  # said once, until it succeeds
            log(
                "handshake-refused",
                level="error",
                address=self._address,
                mend="is this process's public key in the other's --keys folder, and its key here the right one?",
            )


_OPTIONS: dict[int, int] = {
    zmq.MAXMSGSIZE: MAX_MESSAGE_BYTES,
    zmq.LINGER: LINGER_MS,
    zmq.SNDHWM: SEND_QUEUE,
    zmq.RCVHWM: RECEIVE_QUEUE,
    zmq.HANDSHAKE_IVL: HANDSHAKE_MS,
    zmq.RECONNECT_IVL: RECONNECT_MS,
    zmq.RECONNECT_IVL_MAX: RECONNECT_MAX_MS,
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: KEEPALIVE_IDLE_SECONDS,
    zmq.TCP_KEEPALIVE_INTVL: KEEPALIVE_INTERVAL_SECONDS,
    zmq.TCP_KEEPALIVE_CNT: KEEPALIVE_PROBES,
}


def _poll(ours: Sequence[_Socket], timeout_seconds: float) -> set[int]:
    """What has something: the ids of sockets, the descriptors of bells."""
    watched: list[tuple[zmq.Socket[bytes] | int, int]] = []
    for one in ours:
        watched.append((one.socket, _POLLIN))
        watched += [(descriptor, _POLLIN) for descriptor in one.bells]
    return {ready if isinstance(ready, int) else id(ready) for ready, _ in zmq.zmq_poll(watched, _ms(timeout_seconds))}


def _ms(timeout_seconds: float) -> int:
    return math.ceil(min(max(timeout_seconds, 0.0), MAX_WAIT_SECONDS) * 1000)


def _parse(address: str, verb: str, lowest_port: int) -> tuple[str, int]:
    match = _ADDRESS.fullmatch(address)
    port = int(match["port"]) if match else -1
    if match is None or not lowest_port <= port <= 65535:
        raise TransportError(
            f"cannot {verb} {address!r}: an address is tcp://HOST:PORT with a port from {lowest_port} to 65535, "
            "for example tcp://127.0.0.1:5700"
        )
    return match["host"], port


def _interface(host: str, address: str) -> str:
    # zmq binds to numbers and device names only.
    if host == "*":
        return "0.0.0.0"
    try:
        found = sockets.getaddrinfo(host, None, sockets.AF_INET, sockets.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter for a label that no name can have
        raise TransportError(
            f"cannot listen on {address!r}: the host {host!r} has no IPv4 address ({error}); "
            "give one of this machine, 127.0.0.1, or * for all interfaces"
        ) from error
    return str(found[0][4][0])


def _bind_failure(address: str, error: zmq.ZMQError) -> str:
    hints = {
        errno.EADDRINUSE: "the address is in use; stop the process that holds it, "
        "or choose another port (port 0 takes a free one)",
        errno.EADDRNOTAVAIL: "the host is not an address of this machine; give one of its own, or * for all",
        errno.ENODEV: "the host is not an address of this machine; give one of its own, or * for all",
        errno.EACCES: "permission denied; ports below 1024 need privileges, choose a higher one",
        errno.EPERM: "permission denied; ports below 1024 need privileges, choose a higher one",
    }
    return f"cannot listen on {address!r}: {hints.get(error.errno or 0, str(error))}"
