"""Frames through shared memory: the ring as a model, what is refused, and whole messages over real sockets."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.protocol import shared
from paramserver.protocol.buffers import BufferPool
from paramserver.protocol.doorbell import MAX_PACKET_BYTES, Door, DoorError, call
from paramserver.protocol.messages import Initialise, Initialised, Pushed, RefusedUpdate
from paramserver.protocol.shared import (
    ACCEPT,
    DECLINE,
    OFFER,
    OFFER_BYTES,
    RING_BYTES,
    SHARED,
    TOKEN_BYTES,
    Arena,
    SharingError,
    make_arena,
    map_arena,
)
from paramserver.protocol.transport import Bytes, Malformed, Received
from paramserver.protocol.zeromq import ZeroMQChannel, ZeroMQListener, ZeroMQTransport

pytestmark = pytest.mark.skipif(not shared.is_enabled(), reason="memory is shared on Linux only")

DEADLINE_SECONDS = 20.0
LOOPBACK = "tcp://127.0.0.1:0"
ONE = Initialise(request=1, job="j", term=1, layout="x", blocks=(0,))


@dataclass
class Pair:
    maker: Arena
    mapper: Arena


@pytest.fixture
def pair() -> Iterator[Pair]:
    maker = make_arena()
    mapper = map_arena(maker.offer())
    yield Pair(maker, mapper)
    mapper.silence()
    maker.close()


def noise(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


# --------------------------------------------------------------------------------- the ring


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["place", "send", "read", "free"]), st.integers(0, 2**32)), max_size=60))
def test_a_reader_gets_what_was_sent_whatever_is_placed_freed_and_released_meanwhile(
    steps: list[tuple[str, int]],
) -> None:
    maker = make_arena()
    mapper = map_arena(maker.offer())
    placed: list[tuple[Bytes, Bytes]] = []  # a frame in place, and what must stay in it
    sent: deque[tuple[bytes, list[Bytes]]] = deque()
    for step, (kind, seed) in enumerate(steps):
        size = seed % (3 * 2**20)
        if kind == "place":
            frame = maker.outgoing.place(size + 1)
            if frame is not None:
                frame[:] = step
                placed.append((frame, frame.copy()))
        elif kind == "free" and placed:
            maker.outgoing.free(placed.pop(seed % len(placed))[0])
        elif kind == "send":
            frames = [np.full(size, step, np.uint8), *[frame for frame, _ in placed[seed % 3 :]]]
            described = maker.share(b"head", [frame.data for frame in frames])
            if described is not None:
                end, part = described
                maker.outgoing.commit(end)
                sent.append((part, [frame.copy() for frame in frames]))
        elif kind == "read" and sent:
            part, expected = sent.popleft()
            end, [head, *read] = mapper.read(part)
            assert head == b"head"
            assert [bytes(frame) for frame in read] == [frame.tobytes() for frame in expected]
            mapper.incoming.release(end)
        for frame, content in placed:
            assert np.array_equal(frame, content), "a frame that is still needed was overwritten"
    mapper.silence()
    maker.close()


def test_any_part_of_a_placed_frame_arrives_as_it_is(pair: Pair) -> None:
    frame = pair.maker.outgoing.place(1000)
    assert frame is not None
    frame[:] = noise(1000)
    parts = [frame.data, frame[:400].data, frame.data[:300], frame.data[100:], frame[200:].data]
    described = pair.maker.share(b"head", parts)
    assert described is not None
    _, [_, *read] = pair.mapper.read(described[1])
    assert [bytes(part) for part in read] == [bytes(part) for part in parts]
    # The whole and its beginnings lie where they were placed; only the two others were copied.
    assert described[0] == 64 * (-(-1000 // 64) + -(-900 // 64) + -(-800 // 64))


def test_an_empty_ring_begins_again_at_its_front(pair: Pair) -> None:
    addresses = set()
    for _ in range(3):
        frame = pair.maker.outgoing.place(2**20)
        assert frame is not None
        addresses.add(frame.ctypes.data)
        described = pair.maker.share(b"", [frame.data])
        assert described is not None
        pair.maker.outgoing.commit(described[0])
        pair.maker.outgoing.free(frame)
        pair.mapper.incoming.release(described[0])
    assert len(addresses) == 1


def test_a_full_ring_says_so_and_has_room_again_when_it_was_read(pair: Pair) -> None:
    frame = noise(RING_BYTES // 2)
    ends = []
    for _ in range(2):
        described = pair.maker.share(b"", [frame.data])
        assert described is not None
        pair.maker.outgoing.commit(described[0])
        ends.append(described[0])
    assert pair.maker.share(b"", [b"x"]) is None
    assert pair.maker.outgoing.place(1) is None
    pair.mapper.incoming.release(ends[0])
    assert pair.maker.outgoing.place(1) is not None


def test_a_message_that_was_not_sent_leaves_no_hole(pair: Pair) -> None:
    for _ in range(64):
        assert pair.maker.share(b"", [noise(2**20).data]) is not None
    assert pair.maker.share(b"", [noise(2**20).data, noise(RING_BYTES).data]) is None
    assert pair.maker.outgoing.place(RING_BYTES) is not None


def test_a_pool_hands_out_places_and_takes_them_back(pair: Pair) -> None:
    pool = BufferPool()
    small, large = pool.take(8, pair.maker.outgoing), pool.take(RING_BYTES, pair.maker.outgoing)
    assert pair.maker.outgoing.place(64) is None, "the large buffer fills the ring"
    other = pool.take(RING_BYTES, pair.maker.outgoing)
    assert other.ctypes.data != large.ctypes.data
    pool.give([small, large, other], [])
    assert pair.maker.outgoing.place(64) is not None
    assert pool.take(RING_BYTES) is other


# ------------------------------------------------------------------------ what is refused


def forged(pair: Pair, token: bytes | None = None, end: int = 64, spans: tuple[tuple[int, int], ...] = ()) -> bytes:
    token = pair.maker.token if token is None else token
    packed = b"".join(shared._FRAME.pack(*span) for span in spans)
    return shared._DESCRIPTION.pack(SHARED, token, end, len(spans)) + packed


@pytest.mark.parametrize(
    "spans",
    [((0, RING_BYTES + 1),), ((RING_BYTES - 1, 2),), ((2**63, 2**32 - 1),), ((0, RING_BYTES),) * 2],
    ids=["longer than the ring", "over its end", "far away", "more than a message"],
)
def test_spans_that_leave_the_ring_or_the_bounds_are_refused(pair: Pair, spans: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(SharingError):
        pair.mapper.read(forged(pair, spans=spans))


def test_descriptions_that_are_cut_off_or_of_another_arena_are_refused(pair: Pair) -> None:
    whole = forged(pair, spans=((0, 4), (64, 4)))
    for length in range(2, len(whole)):
        with pytest.raises(SharingError):
            pair.mapper.read(whole[:length])
    with pytest.raises(SharingError, match="did not offer"):
        pair.mapper.read(forged(pair, token=bytes(TOKEN_BYTES)))


def test_only_a_sealed_file_made_for_it_is_mapped(pair: Pair) -> None:
    own = f"/proc/{os.getpid()}/fd/"
    unsealed = os.memfd_create(shared._NAME, os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, shared._ARENA_BYTES)
    with tempfile.TemporaryFile() as plain:
        offers = {
            "cannot be opened": f"{own}99999".encode(),
            "no file of a process": b"/etc/passwd",
            "not made for sharing": f"{own}{plain.fileno()}".encode(),
            "not sealed": f"{own}{unsealed}".encode(),
        }
        for reason, path in offers.items():
            with pytest.raises(SharingError, match=reason):
                map_arena(OFFER + pair.maker.token + path)
    os.close(unsealed)
    path = pair.maker.offer()[len(OFFER) + TOKEN_BYTES :]
    with pytest.raises(SharingError, match="another arena"):
        map_arena(OFFER + bytes(TOKEN_BYTES) + path)


def test_a_door_opens_once_and_to_our_own_user_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    token = os.urandom(TOKEN_BYTES)
    with pytest.raises(DoorError, match="no door"):
        call(token)
    door = Door(token)
    with pytest.raises(DoorError, match="can be opened"):
        Door(token)
    with pytest.raises(DoorError, match="nobody"):
        door.answer()
    stranger = call(token)
    with monkeypatch.context() as other:
        other.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(DoorError, match="another user"):
            call(token)
        with pytest.raises(DoorError, match="nobody"):
            door.answer()
    assert not stranger.ring(b"x")
    assert stranger.is_closed
    ours = call(token)
    bell = door.answer()
    assert ours.ring(b"x" * MAX_PACKET_BYTES)
    assert not ours.ring(b"x" * (MAX_PACKET_BYTES + 1))
    assert bell.hear() == b"x" * MAX_PACKET_BYTES
    assert bell.hear() is None
    assert not bell.is_closed
    rung = 0
    while ours.ring(b"y"):
        rung += 1
    ours.close()
    assert [bell.hear() for _ in range(rung)] == [b"y"] * rung, "what was sent before the end is heard"
    assert bell.hear() is None
    assert bell.is_closed
    for end in (stranger, bell, door):
        end.close()


def test_an_arena_whose_maker_is_gone_is_forgotten() -> None:
    program = (
        "import sys; from paramserver.protocol.shared import make_arena; arena = make_arena();"
        "sys.stdout.buffer.write(arena.offer() + b'\\n'); sys.stdout.flush(); sys.stdin.read()"
    )
    mapping = shared.Mapping()
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as maker:
        assert maker.stdout is not None
        offer = b""
        while b"/proc/" not in offer:  # a token may hold a line's end
            offer += maker.stdout.readline()
        assert mapping.answer(b"peer", offer.removesuffix(b"\n")).startswith(ACCEPT)
        mapping.sweep()
        assert mapping.of(b"peer") is not None
        maker.kill()
        maker.wait()
    mapping.sweep()
    assert mapping.of(b"peer") is None


# --------------------------------------------------------------------------- over sockets


@pytest.fixture
def transport() -> Iterator[ZeroMQTransport]:
    made = ZeroMQTransport()
    yield made
    made.close()


@pytest.fixture
def listener(transport: ZeroMQTransport) -> ZeroMQListener:
    return transport.listen(LOOPBACK)


@pytest.fixture
def channel(transport: ZeroMQTransport, listener: ZeroMQListener) -> ZeroMQChannel:
    return transport.connect(listener.address)


def receive(end: ZeroMQListener | ZeroMQChannel) -> Received:
    received = end.receive(DEADLINE_SECONDS)
    assert isinstance(received, Received), received
    return received


def shake_hands(listener: ZeroMQListener, channel: ZeroMQChannel) -> bytes:
    """Exchange one large message, which makes the two share memory; the listener's name for the channel."""
    channel.send(ONE, [noise(OFFER_BYTES).data])
    peer = receive(listener).peer
    listener.send(peer, Initialised(request=1))
    receive(channel)
    assert channel.memory() is not None
    assert listener.memory(peer) is not None
    return peer


def test_messages_go_through_memory_both_ways_and_count_their_frames(
    listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    peer = shake_hands(listener, channel)
    frame = noise(2**20)
    assert channel.send(ONE, [frame.data]).done, "a shared frame is copied at once"
    received = receive(listener)
    assert received.message == ONE
    assert np.array_equal(np.frombuffer(received.frames[0], np.uint8), frame)
    assert received.frames[0].readonly
    assert received.message_bytes > frame.size
    memory = listener.memory(peer)
    assert memory is not None
    place = memory.place(frame.size)
    assert place is not None
    place[:] = frame[::-1]
    listener.send(peer, ONE, [place.data])
    memory.free(place)
    assert np.array_equal(np.frombuffer(receive(channel).frames[0], np.uint8), frame[::-1])


def test_what_has_no_room_goes_through_the_socket_and_arrives_once(
    listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    shake_hands(listener, channel)
    count = 3 * RING_BYTES // 2**20
    for number in range(count):
        channel.send(ONE, [np.full(2**20, number, np.uint8).data])
    arrived = []
    for _ in range(count):
        frame = np.frombuffer(receive(listener).frames[0], np.uint8)
        assert (frame == frame[0]).all()
        arrived.append(int(frame[0]))
    assert sorted(arrived) == list(range(count))
    in_memory = RING_BYTES // 2**20
    assert [number for number in arrived if number < in_memory] == list(range(in_memory)), "in order each way"
    assert [number for number in arrived if number >= in_memory] == list(range(in_memory, count))


def test_a_head_that_is_larger_than_a_packet_goes_through_the_socket(
    listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    peer = shake_hands(listener, channel)
    refused = RefusedUpdate(0, 1, "malformed", "x" * 4096)
    long = Pushed(request=1, acknowledged=(), refused=(refused,) * (MAX_PACKET_BYTES // 4096 + 1))
    for _ in range(3):
        channel.send(long)
        assert receive(listener).message == long
        listener.send(peer, long)
        assert receive(channel).message == long


def test_heads_alone_ring_the_doorbell_and_many_bells_are_heard_in_turn(
    transport: ZeroMQTransport, listener: ZeroMQListener
) -> None:
    channels = [transport.connect(listener.address) for _ in range(3)]
    peers = [shake_hands(listener, channel) for channel in channels]
    for channel in channels:
        for request in range(4):
            channel.send(Initialised(request=request))
    assert transport.wait([listener], DEADLINE_SECONDS) == [listener]
    heard = [receive(listener) for _ in range(12)]
    for peer in peers:
        assert [one.message for one in heard if one.peer == peer] == [Initialised(request=n) for n in range(4)]
    assert len({one.peer for one in heard[:3]}) == 3, "no bell waits for another to fall silent"
    assert listener.receive(0) is None


def test_bells_that_never_stop_do_not_keep_the_socket_waiting(
    transport: ZeroMQTransport, listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    shake_hands(listener, channel)
    other = transport.connect(listener.address)
    other.send(Initialised(request=77))
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        for request in range(2):  # never silent
            channel.send(Initialised(request=request))
        received = listener.receive(0)
        assert isinstance(received, Received)
        if received.message == Initialised(request=77):
            return
    pytest.fail("the message through the socket was never heard")


def test_a_bell_wakes_a_waiting_endpoint(listener: ZeroMQListener, channel: ZeroMQChannel) -> None:
    peer = shake_hands(listener, channel)
    timer = threading.Timer(0.1, lambda: listener.send(peer, Initialised(request=5)))
    timer.start()
    started = time.monotonic()
    assert receive(channel).message == Initialised(request=5)
    assert time.monotonic() - started < DEADLINE_SECONDS / 2
    timer.join()


def test_a_reset_channel_offers_a_fresh_arena(listener: ZeroMQListener, channel: ZeroMQChannel) -> None:
    before = shake_hands(listener, channel)
    channel.reset()
    assert channel.memory() is None
    assert shake_hands(listener, channel) != before


@pytest.mark.parametrize("is_heard", [True, False])
def test_a_listener_that_has_let_go_of_an_arena_is_offered_a_fresh_one_and_nothing_is_lost(
    listener: ZeroMQListener, channel: ZeroMQChannel, is_heard: bool
) -> None:
    peer = shake_hands(listener, channel)
    listener._mapping.forget(peer)
    assert listener.memory(peer) is None
    if is_heard:
        assert channel.receive(0) is None
    for seed in range(2):
        channel.send(ONE, [noise(2**20, seed).data])
        assert np.array_equal(np.frombuffer(receive(listener).frames[0], np.uint8), noise(2**20, seed))
    shake_hands(listener, channel)


def test_without_sharing_everything_goes_through_the_socket(
    transport: ZeroMQTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAMSERVER_SHARED_MEMORY", "off")
    listener = transport.listen(LOOPBACK)
    monkeypatch.setenv("PARAMSERVER_SHARED_MEMORY", "on")
    channel = transport.connect(listener.address)
    for _ in range(3):
        channel.send(ONE, [noise(2**20).data])
        received = receive(listener)
        assert np.array_equal(np.frombuffer(received.frames[0], np.uint8), noise(2**20))
        assert channel.receive(0.1) is None
    assert channel.memory() is None
    assert listener.memory(received.peer) is None


@given(st.binary(max_size=80))
@settings(max_examples=30)
def test_noise_after_the_mark_is_malformed_or_declined_and_changes_nothing(data: bytes) -> None:
    transport = ZeroMQTransport()
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    try:
        listener = transport.listen(LOOPBACK)
        stranger.connect(listener.address)
        for kind in (b"", OFFER, ACCEPT, DECLINE, SHARED):
            stranger.send(b"\xc1" + kind[1:] + data)
        stranger.send_multipart([OFFER, b"second part"])
        while (got := listener.receive(0.2)) is not None:
            assert isinstance(got, Malformed)
        assert not listener._mapping._arenas
        channel = transport.connect(listener.address)
        shake_hands(listener, channel)
    finally:
        stranger.close(0)
        context.term()
        transport.close()
