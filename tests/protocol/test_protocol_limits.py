"""What peers can make us hold, and for how long: bytes that they leave unread, patience that they wear out."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.protocol import backlog as backlog_module
from paramserver.protocol import patience as patience_module
from paramserver.protocol import zeromq as zeromq_module
from paramserver.protocol.backlog import Backlog
from paramserver.protocol.messages import Initialise, Initialised, Tick
from paramserver.protocol.patience import BURST, IGNORE_SECONDS, REFUSALS_A_SECOND, Patience
from paramserver.protocol.shared import OFFER, TOKEN_BYTES
from paramserver.protocol.transport import SENT, ZERO_COPY_BYTES, Received
from paramserver.protocol.zeromq import ZeroMQTransport

DEADLINE_SECONDS = 20.0


class FakeSending:
    def __init__(self) -> None:
        self.done = False


def test_backlog_is_full_until_the_peer_has_read_some() -> None:
    backlog = Backlog(limit_bytes=100)
    sendings = [FakeSending() for _ in range(3)]
    for sending in sendings:
        assert not backlog.is_full(b"p")
        backlog.add(b"p", sending, 40)
    assert backlog.is_full(b"p")
    assert not backlog.is_full(b"other")
    sendings[0].done = True
    assert not backlog.is_full(b"p")
    assert backlog.unread_bytes(b"p") == 80


def test_backlog_keeps_nothing_of_what_is_sent_already() -> None:
    backlog = Backlog(limit_bytes=100)
    for number in range(1000):
        backlog.add(b"%d" % number, SENT, 99)
    assert not backlog._unread


def test_backlog_forgets_peers_that_have_read_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    backlog = Backlog()
    for number in range(10_000):
        sending = FakeSending()
        backlog.add(b"%d" % number, sending, 1)
        sending.done = True
    assert len(backlog._unread) <= 2 * backlog_module.SWEEP_PEERS


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.integers(1, 60), st.booleans()), max_size=60))
def test_no_peer_is_ever_given_more_than_the_limit_and_one_message(steps: list[tuple[bytes, int, bool]]) -> None:
    backlog = Backlog(limit_bytes=100)
    sent: list[tuple[bytes, FakeSending, int]] = []
    for peer, size, reads in steps:
        if reads and sent:
            sent[0][1].done = True
            sent = sent[1:]
        if not backlog.is_full(peer):
            sending = FakeSending()
            backlog.add(peer, sending, size)
            sent.append((peer, sending, size))
        for one in (b"a", b"b"):
            unread = sum(bytes_ for who, sending, bytes_ in sent if who == one and not sending.done)
            assert unread < 100 + 60
            assert backlog.unread_bytes(one) == unread


def test_listener_gives_a_peer_that_does_not_read_no_more_until_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMSERVER_SHARED_MEMORY", "off")
    transport = ZeroMQTransport()
    try:
        listener = transport.listen("tcp://127.0.0.1:0")
        channel = transport.connect(listener.address)
        channel.send(Tick(job="j", worker="w", incarnation=1, step=1))
        received = listener.receive(DEADLINE_SECONDS)
        assert isinstance(received, Received)
        size = 2 * 2**20
        listener.limit_unread(4 * size)
        message = Initialise(request=1, job="j", term=1, layout="x", blocks=(0,))
        frame = bytes(size)
        sent = 0
        while listener.dropped == 0:
            listener.send(received.peer, message, [frame])
            sent += 1
            assert sent < 100, "it is given whatever it leaves unread"
        # Four unread here, RECEIVE_QUEUE at the peer, and what the system's own buffers take.
        assert 4 <= sent - 1 <= 4 + zeromq_module.RECEIVE_QUEUE + 12
        while isinstance(got := channel.receive(1.0), Received):
            assert got.frames[0] == frame
        dropped = listener.dropped
        listener.send(received.peer, Initialised(request=2))
        assert listener.dropped == dropped
        answer = channel.receive(DEADLINE_SECONDS)
        assert isinstance(answer, Received)
        assert answer.message == Initialised(request=2)
        assert size > ZERO_COPY_BYTES
    finally:
        transport.close()


def test_peer_that_sends_only_the_transports_own_parts_does_not_hold_the_loop() -> None:
    transport = ZeroMQTransport()
    try:
        listener = transport.listen("tcp://127.0.0.1:0")
        channel = transport.connect(listener.address)
        for number in range(200):
            channel.socket.send(OFFER + number.to_bytes(TOKEN_BYTES, "big"))  # of no file: declined
        deadline = time.monotonic() + DEADLINE_SECONDS
        channel.send(Tick(job="j", worker="w", incarnation=1, step=1))
        calls = 0
        while True:
            received = listener.receive(0.05)
            calls += 1
            if received is not None:
                break
            assert time.monotonic() < deadline
        assert isinstance(received, Received)
        assert calls >= 200 // zeromq_module.OWN_PARTS
    finally:
        transport.close()


def test_patience_ends_after_a_burst_and_comes_back_after_a_while() -> None:
    patience = Patience()
    assert [patience.wears_out(b"p", 5.0) for _ in range(BURST)] == [False] * (BURST - 1) + [True]
    assert patience.is_ignored(b"p", 5.0 + IGNORE_SECONDS - 0.1)
    assert not patience.is_ignored(b"q", 5.0)
    assert not patience.is_ignored(b"p", 5.0 + IGNORE_SECONDS)
    assert not patience
    assert not patience.wears_out(b"p", 5.0 + IGNORE_SECONDS)


def test_peer_that_errs_now_and_then_is_never_ignored() -> None:
    patience = Patience()
    seconds = 1 / REFUSALS_A_SECOND
    assert not any(patience.wears_out(b"p", seconds * number) for number in range(100_000))


def test_patience_takes_memory_for_a_bounded_number_of_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience_module, "MOST_PEERS", 50)
    patience = Patience()
    for number in range(150):
        patience.wears_out(b"%d" % number, 1.0)
        for _ in range(BURST):
            patience.wears_out(b"ignored-%d" % number, 1.0)
    assert len(patience._levels) <= 50
    assert len(patience._ignored) <= 50
    assert patience.is_ignored(b"ignored-149", 1.0)
