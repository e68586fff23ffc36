"""How a process tells another one of its machine that shared memory holds a message: one packet, one wake-up.

Through a ZeroMQ socket a head wakes the sender's I/O thread, which wakes the receiver's, which wakes the receiver:
on a machine whose cores all compute, each of them waits for its turn. A packet on a Unix socket wakes the reader
itself.

The one that makes an arena (see shared.py) opens a *door* named by the arena's token; the other end connects to it,
and both check that the user at the other end is their own.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

MAX_PACKET_BYTES = 128 * 2**10  # heads are small; what is longer goes the other way
_CREDENTIALS = struct.Struct("3i")  # process, user, group


class DoorError(Exception):
    """A door that cannot be opened, or nobody that we trust behind it. The text says why."""


class Doorbell:
    """One end of a connection. Packets arrive whole, once and in order; neither call blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._buffer = bytearray(MAX_PACKET_BYTES)
        self._descriptor = connection.fileno()
        self.is_closed = False
        """Whether the other end, or this one, has closed it; what was sent before can still be heard."""

    def fileno(self) -> int:
        return self._descriptor

    def ring(self, packet: bytes) -> bool:
        """Send a packet, which is not empty; False where it does not fit now, or nobody hears it any more."""
        if len(packet) > MAX_PACKET_BYTES:
            return False
        try:
            self._connection.send(packet)
        except BlockingIOError:
            return False
        except OSError:
            self.is_closed = True
            return False
        return True

    def hear(self) -> bytes | None:
        """The next packet, None where there is none."""
        try:
            size = self._connection.recv_into(self._buffer)
        except BlockingIOError:
            return None
        except OSError:
            size = 0
        if not size:
            self.is_closed = True
            return None
        return bytes(memoryview(self._buffer)[:size])

    def close(self) -> None:
        self.is_closed = True
        self._connection.close()


class Door:
    """Where the other end of an arena connects to, once. Its name is seen by all, so callers are checked."""

    def __init__(self, token: bytes) -> None:
        self._socket = _socket()
        try:
            self._socket.bind(_name(token))
            self._socket.listen(8)
        except OSError as error:
            self._socket.close()
            raise DoorError(f"no door can be opened: {error}") from error

    def answer(self) -> Doorbell:
        """The first caller of our own user. Raises DoorError where none has connected."""
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                raise DoorError(f"nobody has connected: {error}") from error
            if _user_of(connection) == os.geteuid():
                return Doorbell(connection)
            connection.close()

    def close(self) -> None:
        self._socket.close()


def call(token: bytes) -> Doorbell:
    """Connect to the door of this token. Raises DoorError where it is not here, or not our user's."""
    connection = _socket()
    try:
        connection.connect(_name(token))
        if _user_of(connection) != os.geteuid():
            raise DoorError("the door is another user's")
    except (OSError, DoorError) as error:
        connection.close()
        raise DoorError(f"no door of ours: {error}") from error
    return Doorbell(connection)


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def _name(token: bytes) -> bytes:
    """In the abstract namespace of Linux: no file is left behind, and it is seen in this network namespace only."""
    return b"\0paramserver-" + token.hex().encode()


def _user_of(connection: socket.socket) -> int:
    if sys.platform != "linux":
        raise DoorError("doors are for Linux")
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(packed)[1])
