"""The relay carries every byte, and a cut stops exactly the connections that it names, and says so."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.chaos import proc
from deploy.chaos.wires import Wires
from deploy.local import EngineError

Poll = Callable[..., Any]
OTHER = os.getppid()  # a process that lives and has none of our connections


@pytest.fixture
def wires(tmp_path: Path, processes: object) -> Iterator[Wires]:
    with Wires(tmp_path / "relay.log") as found:
        yield found


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(2**16):
                    connection.sendall(data)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def _round_trip(connection: socket.socket, data: bytes) -> bytes:
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    got = bytearray()
    while len(got) < len(data):
        got += connection.recv(2**16)
    sender.join(5)
    return bytes(got)


def test_every_byte_passes_both_ways(wires: Wires, echo: int) -> None:
    port = wires.open("shard-0")
    wires.aim("shard-0", echo)
    data = os.urandom(5_000_000)
    with _connect(port) as connection:
        assert _round_trip(connection, data) == data


def test_a_connection_waits_until_its_target_is_named(wires: Wires, echo: int) -> None:
    port = wires.open("shard-0")
    with _connect(port) as connection:
        connection.sendall(b"early")
        wires.aim("shard-0", echo)
        assert connection.recv(100) == b"early"


def test_a_cut_closes_what_is_there_refuses_what_comes_and_heals(wires: Wires, echo: int) -> None:
    port = wires.open("shard-0")
    wires.aim("shard-0", echo)
    with _connect(port) as connection:
        assert _round_trip(connection, b"before") == b"before"
        assert wires.cut("c", "shard-0", [os.getpid()], is_silent=False) == 1
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with _connect(port) as refused, pytest.raises(ConnectionResetError):
        refused.recv(1)
    assert wires.look("c").closed == 1
    report = wires.heal("c")
    assert (report.closed, report.refused) == (1, 1)
    assert report.has_fired
    with _connect(port) as connection:
        assert _round_trip(connection, b"after") == b"after"


def test_a_silent_cut_keeps_bytes_back_and_loses_none(wires: Wires, echo: int) -> None:
    port = wires.open("shard-0")
    wires.aim("shard-0", echo)
    with _connect(port) as connection:
        assert _round_trip(connection, b"before") == b"before"
        assert wires.cut("c", "shard-0", [os.getpid()], is_silent=True) == 1
        connection.sendall(b"during")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(5)
        assert wires.look("c").held_bytes == len(b"during")
        report = wires.heal("c")
        assert report.held_bytes == len(b"during")
        assert report.closed == 0
        assert connection.recv(100) == b"during"


def test_a_cut_touches_no_other_process_and_no_other_route(wires: Wires, echo: int) -> None:
    ports = {name: wires.open(name) for name in ("shard-0", "shard-1")}
    for name in ports:
        wires.aim(name, echo)
    with _connect(ports["shard-0"]) as first, _connect(ports["shard-1"]) as second:
        assert _round_trip(first, b"x") == _round_trip(second, b"x") == b"x"
        assert wires.cut("other", "shard-0", [OTHER], is_silent=False) == 0
        assert wires.cut("own", "shard-1", [os.getpid()], is_silent=False) == 1
        assert _round_trip(first, b"still here") == b"still here"
        assert not wires.heal("other").has_fired
        assert wires.heal("own").has_fired


def test_a_new_port_of_a_route_closes_the_older_one_and_a_target_that_is_away_refuses(wires: Wires, echo: int) -> None:
    older = wires.open("shard-0")
    wires.aim("shard-0", echo)
    newer = wires.open("shard-0")
    with pytest.raises(ConnectionRefusedError):
        _connect(older)
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    wires.aim("shard-0", free)
    with _connect(newer) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)


def test_a_relay_that_is_gone_is_told(tmp_path: Path, processes: object) -> None:
    with Wires(tmp_path / "relay.log") as wires:
        os.kill(wires.pid, 9)
        with pytest.raises(EngineError, match="relay"):
            wires.open("shard-0")


def test_what_the_system_says_of_a_process(poll: Poll) -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        poll("it to have worked", lambda: proc.processor_seconds(process.pid) > 0.05, 10)
        assert proc.state(process.pid) == "R"
        process.send_signal(19)
        poll("it to be stopped", lambda: proc.state(process.pid) == "T", 10)
        process.kill()
        poll("it to be dead", lambda: proc.state(process.pid) == "Z", 10)
    assert proc.state(process.pid) == ""
    assert proc.processor_seconds(process.pid) == 0.0


def test_sockets_are_found_by_their_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert port in proc.listening_ports(os.getpid())
        with _connect(port) as client:
            own = client.getsockname()[1]
            assert proc.owner_of_port(own, [OTHER, os.getpid()]) == os.getpid()
            assert proc.owner_of_port(own, [OTHER]) is None
    assert port not in proc.listening_ports(os.getpid())
