"""Closed doors over real sockets: who is not listed reads and changes nothing, and nobody speaks for another."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from paramserver.protocol import keys as keys_module
from paramserver.protocol.framing import encode_message
from paramserver.protocol.keys import Keys, load_keys, make_keys, read_public
from paramserver.protocol.messages import Initialise, Initialised, Tick
from paramserver.protocol.shared import OFFER_BYTES, make_arena
from paramserver.protocol.transport import Malformed, Received, TransportError
from paramserver.protocol.zeromq import ZeroMQChannel, ZeroMQListener, ZeroMQTransport

DEADLINE_SECONDS = 20.0
LOOPBACK = "tcp://127.0.0.1:0"
TICK = Tick(job="j", worker="w", incarnation=1, step=1)
ONE = Initialise(request=1, job="j", term=1, layout="x", blocks=(0,))
SECRET_WORDS = b"the weights of the model, in plain words " * 50


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("coordinator", "worker-0", "worker-1"):
        make_keys(tmp_path / "keys", name)
    return tmp_path / "keys"


@pytest.fixture
def open_transport() -> Iterator[Callable[[Keys | None], ZeroMQTransport]]:
    made: list[ZeroMQTransport] = []

    def make(keys: Keys | None) -> ZeroMQTransport:
        made.append(ZeroMQTransport(keys))
        return made[-1]

    yield make
    for transport in made:
        transport.close()


Opening = Callable[[Keys | None], ZeroMQTransport]


@pytest.fixture
def listener(folder: Path, open_transport: Opening) -> ZeroMQListener:
    return open_transport(load_keys(folder, "coordinator")).listen(LOOPBACK)


@pytest.fixture
def join(folder: Path, open_transport: Opening, listener: ZeroMQListener) -> Callable[[str], ZeroMQChannel]:
    """A channel of the process of that name to the listener."""

    def connect(name: str) -> ZeroMQChannel:
        keys = load_keys(folder, name)
        return open_transport(keys).connect(listener.address, keys.coordinator)

    return connect


def receive(end: ZeroMQListener | ZeroMQChannel) -> Received:
    received = end.receive(DEADLINE_SECONDS)
    assert isinstance(received, Received), received
    return received


def until_failures(listener: ZeroMQListener, count: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while listener.handshake_failures < count:
        assert listener.receive(0.02) is None, "a stranger was heard"
        assert time.monotonic() < deadline, f"counted {listener.handshake_failures} failures, expected {count}"


def test_listed_keys_speak_both_ways_and_their_peers_are_named_by_key(
    folder: Path, listener: ZeroMQListener, join: Callable[[str], ZeroMQChannel]
) -> None:
    for name in ("worker-0", "worker-1"):
        channel = join(name)
        channel.send(TICK)
        received = receive(listener)
        assert listener.key_of(received.peer) == read_public(folder / f"{name}.key")
        assert listener.is_there(received.peer)
        listener.send(received.peer, Initialised(request=7))
        assert receive(channel).message == Initialised(request=7)
    assert listener.handshake_failures == 0


def test_key_that_is_not_listed_is_refused_and_counted(
    folder: Path, tmp_path: Path, open_transport: Opening, listener: ZeroMQListener
) -> None:
    make_keys(tmp_path / "strange", "stranger")
    strange = load_keys(tmp_path / "strange", "stranger", folder / "coordinator.key")
    open_transport(strange).connect(listener.address, strange.coordinator).send(TICK)
    until_failures(listener, 1)


def test_peers_without_keys_or_with_a_wrong_idea_of_ours_are_refused_and_counted(
    folder: Path, open_transport: Opening, listener: ZeroMQListener
) -> None:
    mistaken = load_keys(folder, "worker-0", folder / "worker-1.key")
    for keys, key in ((None, ""), (mistaken, mistaken.coordinator)):
        before = listener.handshake_failures
        channel = open_transport(keys).connect(listener.address, key)
        channel.send(TICK)
        until_failures(listener, before + 1)
        channel.close()  # or it would try again
    before = listener.handshake_failures
    with socket.create_connection(("127.0.0.1", int(listener.address.rpartition(":")[2]))) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(64))
        until_failures(listener, before + 1)


def test_process_that_is_refused_says_so_once_with_the_mend(
    tmp_path: Path, folder: Path, open_transport: Opening, listener: ZeroMQListener, capsys: pytest.CaptureFixture[str]
) -> None:
    make_keys(tmp_path / "strange", "stranger")
    strange = load_keys(tmp_path / "strange", "stranger", folder / "coordinator.key")
    channel = open_transport(strange).connect(listener.address, strange.coordinator)
    for number in (1, 2):
        channel.send(TICK)
        until_failures(listener, number)
        assert channel.receive(0.5) is None
        channel.reset()
    assert capsys.readouterr().err.count("event=handshake-refused") == 1


def test_keys_on_one_side_only_are_a_clear_error(folder: Path, open_transport: Opening) -> None:
    keys = load_keys(folder, "worker-0")
    with pytest.raises(TransportError, match="public key of tcp://127.0.0.1:5 is not known"):
        open_transport(keys).connect("tcp://127.0.0.1:5")
    with pytest.raises(TransportError, match="start it with --keys DIR"):
        open_transport(None).connect("tcp://127.0.0.1:5", keys.coordinator)


def test_listener_with_keys_may_be_reached_from_the_network(folder: Path, open_transport: Opening) -> None:
    assert open_transport(load_keys(folder, "worker-0")).listen("tcp://*:0").address.startswith("tcp://0.0.0.0:")


def test_added_key_is_let_in_and_withdrawn_one_is_not_without_a_restart(
    folder: Path, listener: ZeroMQListener, open_transport: Opening, join: Callable[[str], ZeroMQChannel]
) -> None:
    name = "worker-2"
    make_keys(folder, name)
    public = (folder / f"{name}.key").read_bytes()
    join(name).send(TICK)
    receive(listener)
    (folder / f"{name}.key").unlink()
    channel = join(name)
    channel.send(TICK)
    until_failures(listener, 1)
    (folder / f"{name}.key").write_bytes(public)
    channel.reset()
    channel.send(TICK)
    receive(listener)


def test_open_connection_of_a_withdrawn_key_is_heard_no_more(
    folder: Path, listener: ZeroMQListener, join: Callable[[str], ZeroMQChannel], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = join("worker-0")
    channel.send(TICK)
    receive(listener)
    (folder / "worker-0.key").unlink()
    now = keys_module.monotonic() + keys_module.LOOK_SECONDS
    monkeypatch.setattr(keys_module, "monotonic", lambda: now)
    channel.send(TICK)
    refused = listener.receive(DEADLINE_SECONDS)
    assert isinstance(refused, Malformed)
    assert "withdrawn" in refused.reason


def test_another_listed_key_does_not_become_a_peer_by_taking_its_routing_identity(
    folder: Path, listener: ZeroMQListener, join: Callable[[str], ZeroMQChannel]
) -> None:
    """A routing identity is the peer's own choice: of two with the same one, each is known by its key."""
    names = []
    for name in ("worker-0", "worker-1"):
        keys = load_keys(folder, name)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        with context, context.socket(zmq.DEALER) as raw:
            raw.linger = 2000
            raw.routing_id = b"the same"
            raw.curve_serverkey, raw.curve_publickey, raw.curve_secretkey = (
                key.encode() for key in (keys.coordinator, keys.own.public, keys.own.secret)
            )
            raw.connect(listener.address)
            raw.send_multipart([bytes(part) for part in encode_message(TICK)])
            names.append(receive(listener).peer)
            listener.send(names[-1], Initialised(request=1))
            assert raw.poll(int(DEADLINE_SECONDS * 1000)), "the answer goes to who is there now"
            if len(names) == 2:
                break
        deadline = time.monotonic() + DEADLINE_SECONDS
        while listener.is_there(names[0]):
            assert time.monotonic() < deadline
            listener.receive(0.01)
    assert names[0] != names[1]


@pytest.mark.parametrize("has_keys", [True, False])
def test_what_is_said_is_readable_on_the_wire_only_without_keys(
    folder: Path, open_transport: Opening, monkeypatch: pytest.MonkeyPatch, has_keys: bool
) -> None:
    monkeypatch.setenv("PARAMSERVER_SHARED_MEMORY", "off")
    coordinator, worker = (load_keys(folder, name) if has_keys else None for name in ("coordinator", "worker-0"))
    listener = open_transport(coordinator).listen(LOOPBACK)
    with Tap(listener) as tap:
        channel = open_transport(worker).connect(tap.address, worker.coordinator if worker else "")
        channel.send(ONE, [SECRET_WORDS])
        assert receive(listener).frames[0] == SECRET_WORDS
    assert len(tap.heard) > len(SECRET_WORDS)
    assert (SECRET_WORDS[:40] in tap.heard) is not has_keys


class Tap:
    """Passes bytes between one connection and a listener, and keeps what went to the listener."""

    def __init__(self, listener: ZeroMQListener) -> None:
        self._listener = ("127.0.0.1", int(listener.address.rpartition(":")[2]))
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(DEADLINE_SECONDS)
        self._must_end = threading.Event()
        self._thread = threading.Thread(target=self._relay)
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self.heard = b""

    def __enter__(self) -> Tap:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._must_end.set()
        self._thread.join()
        self._server.close()

    def _relay(self) -> None:
        inner, _ = self._server.accept()
        with inner, socket.create_connection(self._listener) as outer:
            while not self._must_end.is_set():
                for source in select.select([inner, outer], [], [], 0.05)[0]:
                    data = source.recv(2**16)
                    (outer if source is inner else inner).sendall(data)
                    self.heard += data if source is inner else b""


def test_memory_is_shared_with_listed_keys_only(
    folder: Path, listener: ZeroMQListener, join: Callable[[str], ZeroMQChannel]
) -> None:
    arena = make_arena()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(listener.address)
        stranger.send(arena.offer())
        until_failures(listener, 1)
        assert not listener._mapping._arenas
    arena.close()
    channel = join("worker-0")
    channel.send(ONE, [np.zeros(OFFER_BYTES, np.uint8).data])
    peer = receive(listener).peer
    listener.send(peer, Initialised(request=1))
    receive(channel)
    assert channel.memory() is not None, "processes with keys share memory as others do"
    assert listener.memory(peer) is not None
    channel.send(ONE, [np.full(2**20, 7, np.uint8).data])
    assert bytes(receive(listener).frames[0][:3]) == b"\x07\x07\x07"
