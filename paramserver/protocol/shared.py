"""Frames through memory that two processes of one machine share; the heads ring a doorbell (see doorbell.py).

The connected side makes an *arena*, two rings of RING_BYTES with a doorbell, and offers it; the bound side maps it
where it can. A sender writes its frames into the ring, the receiver reads them there and then moves the ring's tail,
which frees the space. What does not fit goes through the socket, head and frames. Nothing is retried or remembered
here. Messages of one arena arrive in order, and so do those of one socket, but either may overtake the other.

An arena is a sealed anonymous file (Linux: memfd) that the other process opens through /proc. It can do so
on the same machine, as the same user, in the same container; elsewhere the offer is declined. The seals keep
a peer from cutting the file under a reader. Both processes can change its bytes at any time, so only
processes of one user share memory: they could as well attach a debugger to each other.

PARAMSERVER_SHARED_MEMORY=off sends everything through sockets.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import struct
import sys
from collections.abc import Sequence

import numpy as np

from paramserver.process import log
from paramserver.protocol.doorbell import Door, Doorbell, DoorError, call
from paramserver.protocol.transport import MAX_MESSAGE_BYTES, Buffer, Bytes, Peer

RING_BYTES = 8 * 2**20  # one way; a worker has at most so much on its way to a shard, or back
OFFER_BYTES = 4 * 2**10  # the first message of so many bytes makes a channel offer an arena
MAX_ARENAS = 256  # mapped by one listener
TOKEN_BYTES = 16

_ALIGNMENT = 64
_HEADER_BYTES = 4096
_ARENA_BYTES = _HEADER_BYTES + 2 * RING_BYTES
_CLOSED_AT, _TAIL_AT = TOKEN_BYTES, (64, 128)  # header: token, closed flag, the tails on cache lines of their own
_NAME = "paramserver-frames"
_PATH = re.compile(r"/proc/(?P<owner>[0-9]{1,10})/fd/[0-9]{1,10}")
_DESCRIPTION = struct.Struct(f"<2s{TOKEN_BYTES}sQH")  # mark, token, end, frames
_FRAME = struct.Struct("<QI")  # position, bytes

# The first byte of everything that is the transport's own; no msgpack begins with it.
MARK = 0xC1
OFFER, ACCEPT, DECLINE, SHARED = b"\xc1O", b"\xc1A", b"\xc1D", b"\xc1S"
PROBE = b"\xc1?"  # says nothing: that it could be queued says that its peer is there


class SharingError(Exception):
    """An arena that cannot be made or mapped, or a description that does not fit it. The text says why."""


def is_enabled() -> bool:
    """Whether this machine can share memory and the user has not turned it off."""
    return sys.platform == "linux" and os.environ.get("PARAMSERVER_SHARED_MEMORY", "on") != "off"


class Ring:
    """One direction of an arena. One process writes, the other reads; positions only grow.

    A frame may be written in place (`place`, then `free` when it is not needed any more) or is copied when
    it is sent. A span is used again when the reader has released it and the writer has freed it.
    """

    def __init__(self, data: mmap.mmap, number: int) -> None:
        start = _HEADER_BYTES + number * RING_BYTES
        self._bytes = np.frombuffer(data, np.uint8, RING_BYTES, start)
        self._address: int = self._bytes.ctypes.data
        self._view = memoryview(data)[start : start + RING_BYTES].toreadonly()
        # One aligned word, stored and loaded whole. The head that names a span passes through the kernel after
        # the span was written, which orders the two on every machine.
        self._tail = np.frombuffer(data, np.uint64, 1, _TAIL_AT[number])
        # The writer's alone: up to where spans are taken, up to where they were sent, where the ring was last empty,
        # and the frames that are in use, by their id: (frame, position), oldest first.
        self._taken = self._sent = self._front = 0
        self._placed: dict[int, tuple[Bytes, int]] = {}

    # ------------------------------------------------------------------- the writer

    def place(self, size: int) -> Bytes | None:
        """Memory (size,) to write a frame in, the caller's until `free`; None where there is no room now."""
        self._rewind()
        position = self._take(size)
        if position is None:
            return None
        offset = position % RING_BYTES
        frame = self._bytes[offset : offset + size]
        self._placed[id(frame)] = frame, position
        return frame

    def free(self, frame: Bytes) -> None:
        """The writer needs a placed frame no more; its reader may still do."""
        del self._placed[id(frame)]

    def describe(self, frames: Sequence[Buffer]) -> tuple[int, list[tuple[int, int]]] | None:
        """Where the frames are, after copying those that are not placed: (end, [(position, bytes)]).

        None where there is no room now. They count as sent only when `commit` is told the end, before the next call.
        """
        self._rewind()
        spans: list[tuple[int, int]] = []
        for frame in frames:
            size = len(frame)
            position = self._position(frame)
            # A span from before the last message that was sent may be released with that one: copied like any other.
            if position is None or position < self._sent:
                position = self._take(size)
                if position is None:
                    return None
                offset = position % RING_BYTES
                if size:
                    self._bytes[offset : offset + size] = np.frombuffer(frame, np.uint8)
            spans.append((position, size))
        return self._taken, spans

    def commit(self, end: int) -> None:
        """What was described up to here is on its way."""
        self._sent = end

    def _position(self, frame: Buffer) -> int | None:
        """Where a frame that was placed, or the beginning of one, lies; None for any other."""
        if type(frame) is not memoryview or not self._placed:
            return None
        found = self._placed.get(id(frame.obj))  # asking an array for its address costs ten times this
        if found is not None and len(frame) == found[0].size:
            return found[1]
        address = np.frombuffer(frame, np.uint8).__array_interface__["data"][0] if len(frame) else 0
        offset = address - self._address
        if not 0 <= offset < RING_BYTES:
            return None
        return next((at for _, at in self._placed.values() if at % RING_BYTES == offset), None)

    def _rewind(self) -> None:
        """Where nothing is in use, begin again at the front, which a small model has still in its cache."""
        if not self._placed and max(int(self._tail[0]), self._front) >= self._sent:
            self._taken = self._sent = self._front = _round_up(self._taken, RING_BYTES)

    def _take(self, size: int) -> int | None:
        position, tail = self._taken, max(int(self._tail[0]), self._front)
        if self._placed:
            tail = min(tail, next(iter(self._placed.values()))[1])
        if position % RING_BYTES + size > RING_BYTES:
            position = _round_up(position, RING_BYTES)
        if position + size - tail > RING_BYTES:
            return None
        self._taken = _round_up(position + size, _ALIGNMENT)
        return position

    # ------------------------------------------------------------------- the reader

    def read(self, position: int, size: int) -> memoryview:
        """A read-only view of a span, valid until it is released. Raises SharingError outside of the ring."""
        offset = position % RING_BYTES
        if offset + size > RING_BYTES:
            raise SharingError(f"a frame of {size} bytes at {offset} leaves the ring of {RING_BYTES}")
        return self._view[offset : offset + size]

    def release(self, end: int) -> None:
        """Everything before this position may be overwritten."""
        if end > int(self._tail[0]):
            self._tail[0] = end


class Arena:
    """Memory shared by the two ends of one connection. Made by `make_arena` or `map_arena`."""

    def __init__(self, descriptor: int, owner: int, writes: int) -> None:
        self._data = mmap.mmap(descriptor, _ARENA_BYTES)
        self._descriptor = -1
        self._door: Door | None = None
        self.bell: Doorbell | None = None  # rung for each message; None until the other end has answered
        self.owner = owner
        self.outgoing = Ring(self._data, writes)
        self.incoming = Ring(self._data, 1 - writes)

    @property
    def token(self) -> bytes:
        return self._data[:TOKEN_BYTES]

    @property
    def is_abandoned(self) -> bool:
        """Whether its maker has closed it, or is gone."""
        if self._data[_CLOSED_AT]:
            return True
        try:
            os.kill(self.owner, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def close(self) -> None:
        """Tell the other end that nothing comes any more. The memory goes when nobody maps it."""
        self._data[_CLOSED_AT] = 1
        self.forget_file()
        self.silence()

    def silence(self) -> None:
        """Ring and hear no more."""
        if self.bell is not None:
            self.bell.close()

    def answer(self) -> None:
        """The maker's: take the other end's call. Raises SharingError where there is none."""
        assert self._door is not None  # an arena is offered and accepted once
        try:
            self.bell = self._door.answer()
        except DoorError as error:
            raise SharingError(str(error)) from error
        finally:
            self.forget_file()

    # ------------------------------------------------------------ the maker's file

    def offer(self) -> bytes:
        """The part that offers this arena to the other end."""
        return OFFER + self.token + f"/proc/{self.owner}/fd/{self._descriptor}".encode()

    def forget_file(self) -> None:
        """Close the maker's descriptor and door: whoever should map the file has done so."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._door is not None:
            self._door.close()
            self._door = None

    # ------------------------------------------------------------------- messages

    def share(self, head: Buffer, frames: Sequence[Buffer]) -> tuple[int, bytes] | None:
        """(end, the one part to send), with the frames in the outgoing ring; None where there is no room now."""
        described = self.outgoing.describe(frames)
        if described is None:
            return None
        end, spans = described
        description = _DESCRIPTION.pack(SHARED, self.token, end, len(spans))
        return end, b"".join([description, *[_FRAME.pack(at, size) for at, size in spans], head])

    def read(self, part: Buffer) -> tuple[int, list[Buffer]]:
        """What `share` described: (end, [head, *frames]). Raises SharingError for whatever else it may be."""
        view = memoryview(part)
        if len(view) < _DESCRIPTION.size:
            raise SharingError(f"a description of shared frames has {_DESCRIPTION.size} bytes or more")
        _, token, end, frames = _DESCRIPTION.unpack_from(view)
        if token != self.token:
            raise SharingError("shared frames of an arena that this connection did not offer")
        head_at = _DESCRIPTION.size + frames * _FRAME.size
        if len(view) < head_at:
            raise SharingError(f"the description of {frames} shared frames is cut off")
        spans = list(_FRAME.iter_unpack(view[_DESCRIPTION.size : head_at]))
        if sum(size for _, size in spans) > MAX_MESSAGE_BYTES:
            raise SharingError(f"the shared frames have more than {MAX_MESSAGE_BYTES} bytes")
        return end, [bytes(view[head_at:]), *[self.incoming.read(at, size) for at, size in spans]]


def make_arena() -> Arena:
    """A fresh arena, owned by this process. Raises SharingError where the system gives none."""
    try:
        descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise SharingError(f"no memory to share: {error}") from error
    try:
        os.ftruncate(descriptor, _ARENA_BYTES)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        arena = Arena(descriptor, os.getpid(), writes=0)
        arena._data[:TOKEN_BYTES] = os.urandom(TOKEN_BYTES)
        arena._door = Door(arena.token)
    except (OSError, DoorError) as error:
        os.close(descriptor)
        raise SharingError(f"no memory to share: {error}") from error
    arena._descriptor = descriptor
    return arena


def map_arena(offer: bytes) -> Arena:
    """The arena of an `Arena.offer`, as its other end. Raises SharingError where it is none that we can trust."""
    token = offer[len(OFFER) : len(OFFER) + TOKEN_BYTES]
    match = _PATH.fullmatch(offer[len(OFFER) + TOKEN_BYTES :].decode("ascii", "replace"))
    if match is None:
        raise SharingError("an offer of shared memory names no file of a process")
    try:
        # Only a file that nothing happens to when it is opened: a peer may name any.
        if not os.readlink(match[0]).startswith(f"/memfd:{_NAME}"):
            raise SharingError(f"{match[0]} is not made for sharing frames")
        descriptor = os.open(match[0], os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SharingError(f"{match[0]} cannot be opened: {error.strerror}") from error
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        try:
            status = os.fstat(descriptor)
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            if status.st_uid != os.geteuid() or status.st_size != _ARENA_BYTES or seals & _SEALS != _SEALS:
                raise SharingError(f"{match[0]} is not this user's, has another size, or is not sealed")
            arena = Arena(descriptor, int(match["owner"]), writes=1)
        except OSError as error:
            raise SharingError(f"{match[0]} cannot be mapped: {error}") from error
    if len(token) != TOKEN_BYTES or arena.token != token:
        raise SharingError(f"{match[0]} is another arena than the one offered")
    try:
        arena.bell = call(token)
    except DoorError as error:
        raise SharingError(str(error)) from error
    return arena


class Offering:
    """The connected end: offers an arena when the first large message comes, and again after a reconnection."""

    def __init__(self) -> None:
        self._arena: Arena | None = None
        self._is_accepted = False
        self._may_offer = is_enabled()

    @property
    def arena(self) -> Arena | None:
        """What messages may go through now."""
        if not self._is_accepted or self._arena is None:
            return None
        if self._arena.bell is None or self._arena.bell.is_closed:
            # The other end is gone. Whatever comes in its place is offered a fresh one.
            self._may_offer = True
            self.abandon()
            return None
        return self._arena

    def due(self, frame_bytes: int) -> bytes | None:
        """The part that should be sent before a message whose frames have so many bytes."""
        if not self._may_offer or self._arena is not None or frame_bytes < OFFER_BYTES:
            return None
        try:
            self._arena = make_arena()
        except SharingError as error:
            self._may_offer = False
            log("memory-not-shared", level="warning", reason=error)
            return None
        return self._arena.offer()

    def hear(self, part: bytes) -> None:
        """Take the other end's answer; what is no answer to our last offer changes nothing."""
        if self._arena is None or self._is_accepted or part[len(ACCEPT) :] != self._arena.token:
            return
        if part.startswith(ACCEPT):
            try:
                self._arena.answer()
                self._is_accepted = True
            except SharingError as error:
                self._may_offer = False
                log("memory-not-shared", level="warning", reason=error)
                self.abandon()
        elif part.startswith(DECLINE):
            self._may_offer = False
            self.abandon()

    def abandon(self) -> None:
        """Write into the arena no more."""
        if self._arena is not None:
            self._arena.close()
        self._arena = None
        self._is_accepted = False


class Mapping:
    """The bound end: the arenas of its peers, one a connection."""

    def __init__(self) -> None:
        self._arenas: dict[Peer, Arena] = {}
        self._accepts = is_enabled()
        self.bells: dict[int, tuple[Peer, Doorbell]] = {}
        """By descriptor: whom to hear."""

    def of(self, peer: Peer) -> Arena | None:
        return self._arenas.get(peer)

    def forget(self, peer: Peer) -> None:
        """Hear and write to this peer's arena no more; nothing happens where it has none."""
        arena = self._arenas.pop(peer, None)
        if arena is not None and arena.bell is not None:
            self.bells.pop(arena.bell.fileno(), None)
            arena.silence()

    def answer(self, peer: Peer, offer: bytes) -> bytes:
        """Map what a peer offers, or decline: the answer to send."""
        token = offer[len(OFFER) : len(OFFER) + TOKEN_BYTES]
        self.sweep()
        if not self._accepts or len(self._arenas) >= MAX_ARENAS:
            return DECLINE + token
        try:
            arena = map_arena(offer)
        except SharingError:
            return DECLINE + token  # another machine, user or container: what the socket is for
        assert arena.bell is not None  # mapping it has connected to its door
        self.forget(peer)
        self._arenas[peer] = arena
        self.bells[arena.bell.fileno()] = peer, arena.bell
        return ACCEPT + token

    def sweep(self) -> None:
        """Forget the arenas that nobody writes into any more."""
        for peer in [peer for peer, arena in self._arenas.items() if arena.is_abandoned]:
            self.forget(peer)

    def close(self) -> None:
        for peer in list(self._arenas):
            self.forget(peer)


def _round_up(position: int, unit: int) -> int:
    return -(-position // unit) * unit


_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if sys.platform == "linux" else 0
