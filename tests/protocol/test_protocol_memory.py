"""The network in memory: the same seed gives the same run, and each fault really happens."""

from __future__ import annotations

import pytest

from paramserver.protocol.memory import OVERTAKING_SECONDS, MemoryChannel, MemoryListener, MemoryNetwork
from paramserver.protocol.messages import Initialise, Initialised, Tick
from paramserver.protocol.transport import ZERO_COPY_BYTES, Malformed, Received, Transport, TransportError

ADDRESS = "memory://shard-0"


def tick(step: int) -> Tick:
    return Tick(job="j", worker="w", incarnation=1, step=step)


def connected(network: MemoryNetwork) -> tuple[MemoryListener, MemoryChannel]:
    return network.listen(ADDRESS), network.connect(ADDRESS)


def steps_heard(listener: MemoryListener) -> list[int]:
    heard = []
    while (received := listener.receive(0)) is not None:
        assert isinstance(received, Received)
        assert isinstance(received.message, Tick)
        heard.append(received.message.step)
    return heard


def exchange(network: MemoryNetwork, count: int = 200) -> list[int]:
    listener, channel = connected(network)
    for step in range(count):
        channel.send(tick(step))
        network.advance(0.001)
    network.advance(10)
    return steps_heard(listener)


def test_a_network_without_faults_delivers_everything_once_and_in_order() -> None:
    network: Transport = MemoryNetwork(seed=1)
    assert isinstance(network, MemoryNetwork)
    assert exchange(network) == list(range(200))
    assert network.faults.delivered == 200


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    def run(seed: int) -> tuple[list[int], object]:
        network = MemoryNetwork(seed, drop=0.2, duplicate=0.2, reorder=0.2, delay=(0.0, 0.02))
        return exchange(network), network.faults

    assert run(7) == run(7)
    assert run(7)[0] != run(8)[0]


def test_dropped_messages_do_not_arrive() -> None:
    network = MemoryNetwork(seed=1, drop=0.3)
    heard = exchange(network)
    assert network.faults.dropped > 20
    assert len(heard) == 200 - network.faults.dropped
    assert heard == sorted(set(heard))


def test_duplicated_messages_arrive_twice() -> None:
    network = MemoryNetwork(seed=1, duplicate=0.3)
    heard = exchange(network)
    assert network.faults.duplicated > 20
    assert len(heard) == 200 + network.faults.duplicated
    assert set(heard) == set(range(200))


def test_reordered_messages_are_overtaken_also_without_a_delay() -> None:
    network = MemoryNetwork(seed=1, reorder=0.3)
    heard = exchange(network)
    assert network.faults.overtaken > 20
    assert heard != sorted(heard)
    assert sorted(heard) == list(range(200))


def test_delayed_messages_arrive_within_the_bounds_and_in_order() -> None:
    network = MemoryNetwork(seed=1, delay=(1.0, 2.0))
    listener, channel = connected(network)
    for step in range(50):
        channel.send(tick(step))
    network.advance(0.999)
    assert steps_heard(listener) == []
    network.advance(0.5)
    early = steps_heard(listener)
    network.advance(0.502)
    late = steps_heard(listener)
    assert late
    assert early + late == list(range(50))


def test_a_cut_address_loses_both_directions_until_it_is_healed() -> None:
    network = MemoryNetwork(seed=1, delay=(0.1, 0.1))
    listener, channel = connected(network)
    channel.send(tick(0))
    received = listener.receive(1)
    assert isinstance(received, Received)

    channel.send(tick(1))  # on its way when the cut happens
    network.cut(ADDRESS)
    network.advance(1)
    channel.send(tick(2))
    listener.send(received.peer, Initialised(request=1))
    network.heal(ADDRESS)  # what was sent during the cut stays lost
    network.advance(1)
    assert network.faults.cut_off == 3
    assert channel.receive(0) is None

    channel.send(tick(3))
    network.advance(1)
    assert steps_heard(listener) == [3]


def test_a_cut_leaves_other_addresses_alone() -> None:
    network = MemoryNetwork(seed=1)
    network.cut("memory://shard-1")
    assert exchange(network, 3) == [0, 1, 2]


def test_a_receive_with_a_timeout_moves_the_clock_to_the_next_delivery_or_its_end() -> None:
    network = MemoryNetwork(seed=1, delay=(0.25, 0.25))
    listener, channel = connected(network)
    assert listener.receive(2.0) is None
    assert network.now == 2.0
    channel.send(tick(0))
    assert listener.receive(0) is None
    assert network.now == 2.0
    assert listener.receive(5.0) is not None
    assert network.now == 2.25


def test_a_waiting_process_lets_the_others_work() -> None:
    network = MemoryNetwork(seed=1, delay=(0.1, 0.1))
    listener, channel = connected(network)

    def answer() -> None:
        while isinstance(received := listener.receive(0.5), Received):
            listener.send(received.peer, Initialised(request=received.message.step))  # type: ignore[attr-defined]

    network.idle = answer
    channel.send(tick(5))
    received = channel.receive(1.0)
    assert isinstance(received, Received)
    assert received.message == Initialised(request=5)
    assert network.now == pytest.approx(0.2)


def test_wait_names_the_endpoints_with_something_to_receive() -> None:
    network = MemoryNetwork(seed=1, delay=(0.1, 0.1))
    listener, channel = connected(network)
    other = network.listen("memory://shard-1")
    assert network.wait([listener, other, channel], 1.0) == []
    assert network.now == 1.0
    channel.send(tick(0))
    assert network.wait([other, listener, channel], 1.0) == [listener]
    assert network.now == pytest.approx(1.1)
    assert network.wait([listener], 1.0) == [listener]
    assert network.now == pytest.approx(1.1)


def test_a_large_frame_is_in_use_until_it_is_delivered() -> None:
    network = MemoryNetwork(seed=1, delay=(0.1, 0.1))
    listener, channel = connected(network)
    frame = bytearray(ZERO_COPY_BYTES)
    message = Initialise(request=1, job="j", term=1, layout="x", blocks=(0,))
    sending = channel.send(message, [frame])
    assert not sending.done
    frame[0] = 1  # too early: the receiver sees it, as it would on the wire
    received = listener.receive(1)
    assert sending.done
    assert isinstance(received, Received)
    assert received.frames[0][0] == 1
    assert received.frames[0].readonly
    frame[0] = 2
    assert received.frames[0][0] == 1


def test_a_small_frame_is_free_at_once() -> None:
    network = MemoryNetwork(seed=1)
    listener, channel = connected(network)
    frame = bytearray(b"abc")
    message = Initialise(request=1, job="j", term=1, layout="x", blocks=(0,))
    assert channel.send(message, [frame]).done
    frame[0] = 0
    received = listener.receive(1)
    assert isinstance(received, Received)
    assert bytes(received.frames[0]) == b"abc"


def test_bytes_that_are_no_message_arrive_as_malformed() -> None:
    network = MemoryNetwork(seed=1)
    listener, channel = connected(network)
    channel.send_buffers([b"\xc1garbage"])
    malformed = listener.receive(1)
    assert isinstance(malformed, Malformed)
    assert malformed.message_bytes == 8
    listener.send(malformed.peer, Initialised(request=1))
    assert isinstance(channel.receive(1), Received)


def test_messages_wait_for_a_listener_that_is_not_there_yet() -> None:
    network = MemoryNetwork(seed=1)
    channel = network.connect(ADDRESS)
    sending = channel.send(tick(1))
    network.advance(1)
    assert not sending.done
    listener = network.listen(ADDRESS)
    assert steps_heard(listener) == [1]
    assert sending.done
    assert channel.reconnections == 0


def test_a_restarted_listener_sees_a_new_peer_and_the_channel_a_reconnection() -> None:
    network = MemoryNetwork(seed=1)
    listener, channel = connected(network)
    channel.send(tick(1))
    first = listener.receive(1)
    listener.close()
    channel.send(tick(2))
    again = network.listen(ADDRESS)
    second = again.receive(1)
    assert isinstance(first, Received)
    assert isinstance(second, Received)
    assert second.message == tick(2)
    assert second.peer != first.peer
    assert channel.reconnections == 1
    again.send(first.peer, Initialised(request=1))
    assert network.faults.unreachable == 1


def test_reset_drops_what_is_on_its_way_and_makes_a_new_peer() -> None:
    network = MemoryNetwork(seed=1, delay=(0.1, 0.1))
    listener, channel = connected(network)
    channel.send(tick(1))
    first = listener.receive(1)
    assert isinstance(first, Received)
    listener.send(first.peer, Initialised(request=1))
    channel.send(tick(2))
    channel.reset()
    channel.send(tick(3))
    network.advance(1)
    assert network.faults.unreachable == 2
    second = listener.receive(0)
    assert isinstance(second, Received)
    assert second.message == tick(3)
    assert second.peer != first.peer
    assert channel.receive(0) is None
    assert channel.reconnections == 1


def test_a_goodbye_leaves_although_its_channel_closes() -> None:
    network = MemoryNetwork(seed=1, delay=(0.1, 0.1))
    listener, channel = connected(network)
    channel.send(tick(9))
    channel.close()
    network.advance(1)
    assert steps_heard(listener) == [9]


def test_an_address_is_taken_once_and_number_zero_takes_a_free_one() -> None:
    network = MemoryNetwork(seed=1)
    network.listen(ADDRESS)
    with pytest.raises(TransportError, match="in use"):
        network.listen(ADDRESS)
    first, second = network.listen("tcp://127.0.0.1:0"), network.listen("tcp://127.0.0.1:0")
    assert first.address != second.address
    assert not first.address.endswith(":0")


@pytest.mark.parametrize("wrong", [{"drop": 1.5}, {"reorder": -0.1}, {"delay": (2.0, 1.0)}])
def test_impossible_faults_are_rejected_when_they_are_set(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MemoryNetwork(1, **wrong)  # type: ignore[arg-type]


def test_reordering_holds_a_message_back_for_at_least_the_stated_time() -> None:
    network = MemoryNetwork(seed=1, reorder=1.0)
    listener, channel = connected(network)
    channel.send(tick(1))
    network.advance(OVERTAKING_SECONDS * 0.99)
    assert steps_heard(listener) == []
    network.advance(OVERTAKING_SECONDS * 1.01)
    assert steps_heard(listener) == [1]


def test_a_link_carries_so_many_bytes_a_second_and_keeps_order() -> None:
    network = MemoryNetwork(seed=1, bytes_a_second=1000.0)
    listener, channel = connected(network)
    frame = bytes(500)
    initialise = Initialise(request=1, job="j", term=1, layout="l", blocks=(0,))
    channel.send(initialise, [frame])
    channel.send(tick(1))
    network.advance(0.5)
    assert listener.receive(0) is None, "its last byte is not there"
    network.advance(0.1)
    first = listener.receive(0)
    assert isinstance(first, Received)
    assert network.now * 1000 >= first.message_bytes >= 500
    network.advance(0.1)
    assert steps_heard(listener) == [1]


def test_each_way_carries_its_own() -> None:
    network = MemoryNetwork(seed=1, bytes_a_second=1000.0)
    listener, channel = connected(network)
    channel.send(tick(1))
    network.advance(1.0)
    received = listener.receive(0)
    assert isinstance(received, Received)
    channel.send(Initialise(request=1, job="j", term=1, layout="l", blocks=(0,)), [bytes(900)])
    listener.send(received.peer, Initialised(request=1))
    network.advance(0.1)
    assert isinstance(channel.receive(0), Received), "the answer does not wait for what goes the other way"
