"""`python -m deploy.chaos.relay`: the process through which the connections of all others go, and which cuts them.

Commands come as lines of JSON on standard input and are answered by one line each on standard output. A *route* is a
port that this process listens on, in front of one target; until the target is named, connections wait. A *cut* is
about one route and about connections of certain processes: it closes them and every new one, or, silently, passes no
byte on either way until it is healed. What it did is counted: a cut that touched nothing proves nothing.

    {"open": ROUTE}                                        -> {"port": N}   of a new port; the route's older one closes
    {"target": ROUTE, "port": N}                           -> {}
    {"cut": NAME, "route": ROUTE, "pids": [N], "is_silent": false} -> {"connections": N}   that it hit at once
    {"look": NAME}                                         -> {"closed": N, "refused": N, "held_bytes": N}   so far
    {"heal": NAME}                                         -> the same, in all
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import selectors
import socket
import struct
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deploy.chaos.proc import owner_of_port

CHUNK_BYTES = 2**18
MOST_BYTES = 2**20  # one way of a connection holds so much; then its sender waits, as behind a full socket
HOST = "127.0.0.1"
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close that the other end sees as a reset


@dataclass(eq=False)
class Cut:
    name: str
    route: str
    pids: tuple[int, ...]
    is_silent: bool
    closed: int = 0
    refused: int = 0

    def hits(self, pid: int | None) -> bool:
        return pid is not None and pid in self.pids


@dataclass(eq=False)
class Way:
    """One direction of a connection: bytes read from `source` that `sink` has not taken."""

    source: socket.socket
    sink: socket.socket
    waiting: bytearray = field(default_factory=bytearray)
    is_ended: bool = False  # the source has closed


@dataclass(eq=False)
class Connection:
    client: socket.socket
    route: Route
    client_port: int
    server: socket.socket | None = None
    ways: tuple[Way, ...] = ()
    cut: Cut | None = None  # the silent one that holds it

    def sockets(self) -> list[socket.socket]:
        return [self.client] if self.server is None else [self.client, self.server]


@dataclass(eq=False)
class Route:
    name: str
    listener: socket.socket
    target_port: int = 0
    connections: list[Connection] = field(default_factory=list)


class Relay:
    """One thread, no blocking call but the selector's."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._routes: dict[str, list[Route]] = {}  # by name, the newest last; older ones keep their connections
        self._cuts: dict[str, Cut] = {}

    def watch(self, stream: int, on_line: Callable[[int], None]) -> None:
        self._selector.register(stream, READ, lambda mask: on_line(stream))

    def step(self, timeout_seconds: float | None = None) -> None:
        for key, mask in self._selector.select(timeout_seconds):
            # An event before this one may have closed it.
            if self._selector.get_map().get(key.fd) is key:
                key.data(mask)

    def close(self) -> None:
        for routes in self._routes.values():
            for route in routes:
                route.listener.close()
                for connection in list(route.connections):
                    self._close(connection, is_reset=False)
        self._selector.close()

    # ------------------------------------------------------------------------------ commands

    def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Raises KeyError, ValueError for what is no command, OSError where no port is free."""
        match command:
            case {"open": str(name)}:
                return {"port": self._open(name)}
            case {"target": str(name), "port": int(port)}:
                self._aim(self._routes[name][-1], port)
                return {}
            case {"cut": str(name), "route": str(route), "pids": list(pids), "is_silent": bool(is_silent)}:
                return {"connections": self._cut(Cut(name, route, tuple(pids), is_silent))}
            case {"look": str(name)}:
                return self._report(self._cuts[name])
            case {"heal": str(name)}:
                return self._heal(self._cuts.pop(name))
        raise ValueError(f"no command of the relay: {command}")

    def _open(self, name: str) -> int:
        listener = socket.create_server((HOST, 0), backlog=128)
        listener.setblocking(False)
        route = Route(name, listener)
        for older in self._routes.setdefault(name, []):
            self._unwatch(older.listener)
            older.listener.close()
        self._routes[name].append(route)
        self._selector.register(listener, READ, lambda mask: self._accept(route))
        port: int = listener.getsockname()[1]
        return port

    def _aim(self, route: Route, port: int) -> None:
        route.target_port = port
        for connection in list(route.connections):
            if connection.server is None:
                self._join(connection)

    def _cut(self, cut: Cut) -> int:
        self._cuts[cut.name] = cut
        hit = 0
        for route in self._routes.get(cut.route, []):
            for connection in list(route.connections):
                if cut.hits(owner_of_port(connection.client_port, cut.pids)):
                    hit += 1
                    self._apply(cut, connection)
        return hit

    def _apply(self, cut: Cut, connection: Connection) -> None:
        if cut.is_silent:
            connection.cut = cut
            self._watch_ways(connection)
        else:
            cut.closed += 1
            self._close(connection, is_reset=True)

    def _report(self, cut: Cut) -> dict[str, Any]:
        held_bytes = sum(map(self._held, self._held_by(cut)))
        return {"closed": cut.closed, "refused": cut.refused, "held_bytes": held_bytes}

    def _held_by(self, cut: Cut) -> list[Connection]:
        routes = self._routes.get(cut.route, [])
        return [connection for route in routes for connection in route.connections if connection.cut is cut]

    def _heal(self, cut: Cut) -> dict[str, Any]:
        report = self._report(cut)
        for connection in self._held_by(cut):
            connection.cut = None
            self._watch_ways(connection)
        return report

    @staticmethod
    def _held(connection: Connection) -> int:
        """Bytes of a connection that wait in this process or before its sockets."""
        held = sum(len(way.waiting) for way in connection.ways)
        for one in connection.sockets():
            queued = array.array("i", [0])
            fcntl.ioctl(one.fileno(), termios.FIONREAD, queued)
            held += queued[0]
        return held

    # --------------------------------------------------------------------------- connections

    def _accept(self, route: Route) -> None:
        try:
            client, address = route.listener.accept()
        except OSError:
            return  # it has gone again
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(client, route, address[1])
        route.connections.append(connection)
        cut = self._cut_of(connection)
        if cut is not None:
            cut.refused += 1
            if not cut.is_silent:
                self._close(connection, is_reset=True)
                return
            connection.cut = cut
        if route.target_port:
            self._join(connection)

    def _cut_of(self, connection: Connection) -> Cut | None:
        for cut in self._cuts.values():
            if cut.route == connection.route.name and cut.hits(owner_of_port(connection.client_port, cut.pids)):
                return cut
        return None

    def _join(self, connection: Connection) -> None:
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.settimeout(1.0)  # on loopback it answers or refuses at once
        try:
            server.connect((HOST, connection.route.target_port))
        except OSError:
            server.close()
            self._close(connection, is_reset=True)  # nobody is there: so says the relay
            return
        server.setblocking(False)
        connection.server = server
        connection.ways = (Way(connection.client, server), Way(server, connection.client))
        self._watch_ways(connection)

    def _watch_ways(self, connection: Connection) -> None:
        """Ask for what can go on: reading where there is room, writing where something waits; nothing in a cut."""
        wanted: dict[socket.socket, int] = dict.fromkeys(connection.sockets(), 0)
        if connection.cut is None:
            for way in connection.ways:
                if not way.is_ended and len(way.waiting) < MOST_BYTES:
                    wanted[way.source] |= READ
                if way.waiting:
                    wanted[way.sink] |= WRITE
        for one, mask in wanted.items():
            self._watch(one, mask, connection)

    def _watch(self, one: socket.socket, mask: int, connection: Connection) -> None:
        is_known = one.fileno() in self._selector.get_map()
        if not mask:
            self._unwatch(one)
        elif not is_known:
            self._selector.register(one, mask, lambda ready: self._move(connection, one, ready))
        elif self._selector.get_key(one).events != mask:
            self._selector.modify(one, mask, self._selector.get_key(one).data)

    def _unwatch(self, one: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(one)

    def _move(self, connection: Connection, ready: socket.socket, mask: int) -> None:
        try:
            for way in connection.ways:
                if way.source is ready and mask & READ:
                    data = ready.recv(CHUNK_BYTES)
                    way.is_ended = not data
                    way.waiting += data
                if way.waiting and (way.sink is ready or way.source is ready):
                    del way.waiting[: _send(way.sink, way.waiting)]
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection, is_reset=True)
            return
        if any(way.is_ended and not way.waiting for way in connection.ways):
            self._close(connection, is_reset=False)
        else:
            self._watch_ways(connection)

    def _close(self, connection: Connection, is_reset: bool) -> None:
        connection.route.connections.remove(connection)
        for one in connection.sockets():
            self._unwatch(one)
            if is_reset:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            one.close()


def _send(sink: socket.socket, data: bytearray) -> int:
    try:
        return sink.send(data)
    except BlockingIOError:
        return 0


def main() -> int:
    relay, unread, is_over = Relay(), b"", False

    def on_line(stream: int) -> None:
        nonlocal unread, is_over
        read = os.read(stream, 2**16)
        is_over = not read  # whoever started us is gone
        *lines, unread = (unread + read).split(b"\n")
        for line in lines:
            sys.stdout.write(json.dumps(relay.obey(json.loads(line))) + "\n")
            sys.stdout.flush()

    relay.watch(sys.stdin.fileno(), on_line)
    while not is_over:
        relay.step()
    relay.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
