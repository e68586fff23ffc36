"""The ZeroMQ transport over real sockets on loopback."""

from __future__ import annotations

import random
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from paramserver.protocol.messages import ExportPart, Initialise, Initialised, Refusal, Tick
from paramserver.protocol.transport import (
    MAX_MESSAGE_BYTES,
    SENT,
    ZERO_COPY_BYTES,
    Malformed,
    Received,
    Transport,
    TransportError,
)
from paramserver.protocol.zeromq import SEND_QUEUE, ZeroMQChannel, ZeroMQListener, ZeroMQTransport

DEADLINE_SECONDS = 20.0
LOOPBACK = "tcp://127.0.0.1:0"


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


def tick(step: int) -> Tick:
    return Tick(job="j", worker="w", incarnation=1, step=step)


def initialise(*blocks: int) -> Initialise:
    return Initialise(request=1, job="j", term=1, layout="x", blocks=blocks)


def receive(end: ZeroMQListener | ZeroMQChannel) -> Received:
    received = end.receive(DEADLINE_SECONDS)
    assert isinstance(received, Received), received
    return received


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE_SECONDS} s for {what}"
        time.sleep(0.005)


def port_of(listener: ZeroMQListener) -> int:
    return int(listener.address.rpartition(":")[2])


def write_raw(listener: ZeroMQListener, data: bytes) -> None:
    """Write bytes into a TCP connection and wait until the listener, which goes on receiving, has closed it."""
    with socket.create_connection(("127.0.0.1", port_of(listener)), timeout=DEADLINE_SECONDS) as raw:
        raw.sendall(data)
        try:
            raw.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the listener was faster
        raw.settimeout(0.005)

        def closed() -> bool:
            # Some noise is a message of the oldest ZeroMQ protocol: it reaches us, as malformed.
            received = listener.receive(0)
            assert received is None or isinstance(received, Malformed)
            try:
                return not raw.recv(4096)
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        until(closed, "the listener to close a connection that makes no sense")


def test_a_message_and_its_answer_travel(
    transport: Transport, listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    channel.send(initialise(3, 4), [b"abc", memoryview(b"\0\0\0\0").cast("f")])
    request = receive(listener)
    assert request.message == initialise(3, 4)
    assert [bytes(frame) for frame in request.frames] == [b"abc", b"\0\0\0\0"]
    listener.send(request.peer, Initialised(request=1))
    assert receive(channel).message == Initialised(request=1)


def test_frames_on_both_sides_of_the_zero_copy_bound_arrive_intact_and_read_only(
    listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    sizes = (0, 1, ZERO_COPY_BYTES - 1, ZERO_COPY_BYTES, ZERO_COPY_BYTES + 1, 4 * 2**20)
    frames = [random.Random(size).randbytes(size) for size in sizes]
    channel.send(initialise(*range(len(sizes))), frames)
    received = receive(listener)
    assert [bytes(frame) for frame in received.frames] == frames
    assert all(frame.readonly for frame in received.frames)
    assert received.message_bytes > sum(sizes)


def test_received_frames_outlive_later_messages(listener: ZeroMQListener, channel: ZeroMQChannel) -> None:
    for fill in range(6):
        channel.send(initialise(0), [bytes([fill]) * ZERO_COPY_BYTES])
    kept = [receive(listener).frames[0] for _ in range(6)]
    assert [frame[-1] for frame in kept] == list(range(6))


def test_a_large_frame_is_released_after_it_left_and_a_small_one_at_once(
    listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    assert channel.send(initialise(0), [b"x" * (ZERO_COPY_BYTES - 1)]) is SENT
    one = channel.send(initialise(0), [bytearray(2**20)])
    two = channel.send(initialise(0, 1), [bytearray(2**20), bytearray(2**20)])
    for _ in range(3):
        receive(listener)
    until(lambda: one.done and two.done, "the frames to be released")


def test_a_large_frame_that_cannot_leave_is_still_in_use(transport: ZeroMQTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, but never speaks
        channel = transport.connect(f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        sending = channel.send(initialise(0), [bytearray(2**20)])
        assert channel.receive(0.2) is None
        assert not sending.done
        channel.reset()
        until(lambda: sending.done, "a reset to release what was queued")


def test_receive_with_timeout_zero_does_not_block_and_others_wait_their_time(listener: ZeroMQListener) -> None:
    began = time.monotonic()
    for _ in range(100):
        assert listener.receive(0) is None
    assert time.monotonic() - began < 1
    began = time.monotonic()
    assert listener.receive(0.2) is None
    assert time.monotonic() - began > 0.19


def test_waiting_uses_no_processor_time(
    transport: ZeroMQTransport, listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    channel.send(tick(1))
    receive(listener)
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert listener.receive(0.5) is None
    assert transport.wait([listener, channel], 0.5) == []
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 0.1


def test_a_signal_does_not_break_a_wait(listener: ZeroMQListener, channel: ZeroMQChannel) -> None:
    seen: list[int] = []

    def on_alarm(number: int, frame: object) -> None:
        seen.append(number)
        if len(seen) == 3:
            channel.send(tick(1))

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        assert receive(listener).message == tick(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert len(seen) >= 3


def test_wait_names_listeners_and_channels_that_have_something(
    transport: ZeroMQTransport, listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    other = transport.listen(LOOPBACK)
    channel.send(tick(1))
    assert transport.wait([other, channel, listener], DEADLINE_SECONDS) == [listener]
    listener.send(receive(listener).peer, Initialised(request=1))
    assert transport.wait([other, channel, listener], DEADLINE_SECONDS) == [channel]


def test_port_zero_takes_a_free_port_and_keeps_the_host_name(transport: ZeroMQTransport) -> None:
    listener = transport.listen("tcp://localhost:0")
    host, _, port = listener.address.rpartition(":")
    assert host == "tcp://localhost"
    assert 0 < int(port) < 65536
    transport.connect(listener.address).send(tick(1))
    receive(listener)


def test_a_listener_without_keys_is_open_to_the_network_only_where_that_is_said(transport: ZeroMQTransport) -> None:
    for address in ("tcp://*:0", "tcp://0.0.0.0:0", "tcp://192.0.2.1:0"):
        with pytest.raises(TransportError, match=r"without keys.*paramserver keygen.*--keys DIR.*--insecure"):
            transport.listen(address)
    assert transport.listen("tcp://127.8.8.8:0").address.startswith("tcp://127.8.8.8:")
    insecure = ZeroMQTransport(is_insecure=True)
    assert insecure.listen("tcp://*:0").address.startswith("tcp://0.0.0.0:")
    insecure.close()


def test_a_taken_port_is_a_clear_error(transport: ZeroMQTransport, listener: ZeroMQListener) -> None:
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:\d+.*in use.*another port"):
        transport.listen(listener.address)


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1:5", "tcp://", "tcp://:5", "tcp://host", "tcp://host:", "tcp://host:65536", "tcp://host:-1",
     "tcp://host:1x", "udp://host:1", "tcp://a b:1", "tcp://[::1]:1", "ipc:///tmp/x", "tcp://host:1\n"],
)  # fmt: skip
def test_what_is_no_address_is_a_clear_error(transport: ZeroMQTransport, address: str) -> None:
    with pytest.raises(TransportError, match="tcp://HOST:PORT"):
        transport.listen(address)
    with pytest.raises(TransportError, match="tcp://HOST:PORT"):
        transport.connect(address)


@pytest.mark.parametrize("address", ["tcp://192.0.2.1:0", "tcp://no-such-host.invalid:0", f"tcp://{'a' * 70}:0"])
def test_a_host_that_is_not_this_machine_cannot_be_listened_on(address: str) -> None:
    insecure = ZeroMQTransport(is_insecure=True)
    with pytest.raises(TransportError, match=r"cannot listen on .*give one of"):
        insecure.listen(address)
    insecure.close()


def test_nobody_connects_to_port_zero_or_to_all_interfaces(transport: ZeroMQTransport) -> None:
    with pytest.raises(TransportError, match="from 1 to"):
        transport.connect("tcp://127.0.0.1:0")
    with pytest.raises(TransportError, match="name one host"):
        transport.connect("tcp://*:5")


RAW = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(64),
    "ones": b"\xff" * 64,
    "nothing": b"",
    "another mechanism": b"\xff" + bytes(8) + b"\x7f\x03\0CURVE" + bytes(47),
    "a handshake that breaks off": b"\xff" + bytes(8) + b"\x7f\x03\0NULL" + bytes(48) + b"\x04\x05junk!",
    "noise": random.Random(3).randbytes(5000),
}


@pytest.mark.parametrize("data", RAW.values(), ids=RAW.keys())
def test_garbage_on_the_port_is_counted_and_harms_nobody(
    listener: ZeroMQListener, channel: ZeroMQChannel, data: bytes
) -> None:
    channel.send(tick(1))
    peer = receive(listener).peer
    assert listener.handshake_failures == 0
    write_raw(listener, data)
    until(lambda: listener.handshake_failures == 1, "the failed handshake to be counted")
    listener.send(peer, Initialised(request=1))
    assert receive(channel).message == Initialised(request=1)
    assert channel.reconnections == 0
    assert listener.handshake_failures == 1


def test_every_one_of_many_random_connections_is_counted(listener: ZeroMQListener, channel: ZeroMQChannel) -> None:
    generator = random.Random(11)
    for _ in range(60):
        write_raw(listener, generator.randbytes(generator.randint(1, 300)))
    until(lambda: listener.handshake_failures == 60, "60 failed handshakes")
    channel.send(tick(1))
    assert receive(listener).message == tick(1)


def test_garbage_that_waits_does_not_hide_a_good_peer_behind_it(
    transport: ZeroMQTransport, listener: ZeroMQListener
) -> None:
    with socket.create_connection(("127.0.0.1", port_of(listener))):
        channel = transport.connect(listener.address)
        channel.send(tick(1))
        receive(listener)
        assert listener.handshake_failures == 0
    until(lambda: listener.handshake_failures == 1, "the failed handshake to be counted")
    channel.close()
    gone = transport.connect(listener.address)
    gone.send(tick(2))
    receive(listener)
    assert listener.handshake_failures == 1


def test_a_peer_whose_bytes_are_no_message_is_named_and_can_be_answered(
    listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    channel.socket.send_multipart([b"\xc1garbage", b"frame"])
    malformed = listener.receive(DEADLINE_SECONDS)
    assert isinstance(malformed, Malformed)
    assert malformed.message_bytes == 13
    refusal = Refusal(code="malformed", detail=malformed.reason)
    listener.send(malformed.peer, refusal)
    assert receive(channel).message == refusal


def test_a_message_whose_parts_exceed_the_bound_together_is_malformed(
    listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    channel.socket.send_multipart([b"head"] + [bytes(2**20)] * 12)
    malformed = listener.receive(DEADLINE_SECONDS)
    assert isinstance(malformed, Malformed)
    assert malformed.message_bytes == 12 * 2**20 + 4
    assert f"allowed are {MAX_MESSAGE_BYTES}" in malformed.reason
    channel.socket.send_multipart([b"head"] + [b""] * 10_000)
    malformed = listener.receive(DEADLINE_SECONDS)
    assert isinstance(malformed, Malformed)
    assert "frames" in malformed.reason
    channel.send(tick(1))
    assert receive(listener).message == tick(1)


def test_a_frame_above_the_bound_ends_only_the_connection_that_sent_it(
    transport: ZeroMQTransport, listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    offender = transport.connect(listener.address)
    offender.send(tick(1))
    receive(listener)
    offender.socket.send(bytes(MAX_MESSAGE_BYTES + 1))
    until(lambda: offender.reconnections > 0, "the offender to be disconnected")
    channel.send(tick(2))
    assert receive(listener).message == tick(2)


def test_an_answer_to_a_peer_that_is_gone_is_dropped_and_counted(
    listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    channel.send(tick(1))
    peer = receive(listener).peer
    channel.close()

    def dropped() -> bool:
        listener.send(peer, Initialised(request=1))
        return listener.dropped > 0

    until(dropped, "the peer to be noticed as gone")
    assert listener.send(b"nobody", Initialised(request=1)).done


def test_a_peer_is_there_until_its_connection_ends_and_does_not_hear_the_question(
    listener: ZeroMQListener, channel: ZeroMQChannel
) -> None:
    assert not listener.is_there(b"nobody")
    channel.send(tick(1))
    peer = receive(listener).peer
    assert listener.is_there(peer)
    listener.send(peer, tick(2))
    assert receive(channel).message == tick(2), "only what was sent is received"
    channel.reset()
    channel.send(tick(3))
    again = receive(listener).peer
    until(lambda: not listener.is_there(peer), "the old connection to end")
    assert listener.is_there(again)


def test_a_full_queue_drops_and_counts(transport: ZeroMQTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        channel = transport.connect(f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        for step in range(SEND_QUEUE + 5):
            channel.send(tick(step))
        assert channel.dropped == 5
        channel.reset()  # so that the end does not linger


def test_what_was_queued_leaves_before_a_close(transport: ZeroMQTransport, listener: ZeroMQListener) -> None:
    leaving = ZeroMQTransport()
    channel = leaving.connect(listener.address)
    channel.send(tick(1))
    leaving.close()
    assert receive(listener).message == tick(1)
    leaving.close()  # a second time changes nothing


def test_messages_wait_for_a_listener_and_survive_its_restart(transport: ZeroMQTransport) -> None:
    first = transport.listen(LOOPBACK)
    address = first.address
    channel = transport.connect(address)
    channel.send(tick(1))
    before = receive(first)
    assert channel.reconnections == 0
    first.close()

    again: list[ZeroMQListener] = []

    def bound() -> bool:
        try:
            again.append(transport.listen(address))
        except TransportError:
            return False
        return True

    until(bound, "the port to be free again")
    until(lambda: channel.reconnections == 1, "the channel to reconnect")
    channel.send(tick(2))
    after = receive(again[0])
    assert after.message == tick(2)
    assert after.peer != before.peer


def test_reset_makes_a_new_peer_and_counts_as_a_reconnection(listener: ZeroMQListener, channel: ZeroMQChannel) -> None:
    channel.send(tick(1))
    before = receive(listener)
    channel.reset()
    channel.send(tick(2))
    after = receive(listener)
    assert after.message == tick(2)
    assert after.peer != before.peer
    until(lambda: channel.reconnections == 1, "the reconnection to be counted")
    listener.send(after.peer, Initialised(request=1))
    assert receive(channel).message == Initialised(request=1)


def test_four_megabyte_parts_travel_several_in_flight(listener: ZeroMQListener, channel: ZeroMQChannel) -> None:
    data = random.Random(5).randbytes(4 * 2**20)
    for part in range(12):
        message = ExportPart(name="w", incarnation=1, job="j", lease=1, offset=part, total=12)
        channel.send(message, [memoryview(data)])
    for part in range(12):
        received = receive(listener)
        assert isinstance(received.message, ExportPart)
        assert received.message.offset == part
        assert received.frames[0] == data
