"""The transport alone, between two processes: round trips a second and GB/s, through sockets and shared memory.

A message takes a frame there and is answered with one of the same size. The sender hands over memory of its own
and the receiver copies what came into memory of its own: as work that is done with a frame it is the least.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paramserver.cli.bench.crew import Crew, Line, MeasurementError
from paramserver.cli.bench.exchange import LOOPBACK, shared_memory

ANSWER_SECONDS = 30.0  # an answer over loopback that takes longer never comes
MEMORY_WAYS = ("sockets", "shared memory")


@dataclass(frozen=True)
class WireSetting:
    frame_bytes: int
    in_flight: int
    seconds: float
    is_memory_shared: bool


@dataclass(frozen=True)
class WireRate:
    round_trips_per_second: float

    def gigabytes_per_second(self, frame_bytes: int) -> float:
        """Frames there and back."""
        return self.round_trips_per_second * 2 * frame_bytes / 1e9


def measure(setting: WireSetting) -> WireRate:
    """Raises MeasurementError where a process fails."""
    with Crew(shared_memory(setting.is_memory_shared)) as crew:
        answering = crew.start("answering", answer, setting.frame_bytes)
        (address,) = crew.hear([answering], "to listen")
        asking = crew.start("asking", ask, address, setting)
        (rate,) = crew.hear([asking], "its round trips")
        crew.join([asking])
        crew.end([answering])
    return WireRate(rate)


def answer(line: Line, frame_bytes: int) -> None:
    """Answer every Push with a Pulled that has a frame of the same size."""
    from threading import Event, Thread

    import numpy as np

    from paramserver.protocol.messages import BlockValue, Pulled, Push
    from paramserver.protocol.shared import OFFER_BYTES
    from paramserver.protocol.transport import Received
    from paramserver.protocol.zeromq import ZeroMQTransport

    transport = ZeroMQTransport()
    listener = transport.listen(LOOPBACK)
    line.say(listener.address)
    is_over = Event()

    def wait_for_end() -> None:
        line.hear()
        is_over.set()

    Thread(target=wait_for_end, daemon=True).start()
    largest = max(frame_bytes, OFFER_BYTES)
    ours, theirs = np.zeros(largest, np.uint8), np.empty(largest, np.uint8)
    value = BlockValue(0, 1, "snapshot", "fp32", 1)
    while not is_over.is_set():
        received = listener.receive(0.2)
        if isinstance(received, Received) and isinstance(received.message, Push):
            sizes = [len(frame) for frame in received.frames]
            for frame, size in zip(received.frames, sizes, strict=True):
                theirs[:size] = np.frombuffer(frame, np.uint8)
            pulled = Pulled(request=received.message.request, values=(value,) * len(sizes))
            listener.send(received.peer, pulled, [ours[:size].data for size in sizes])
    transport.close()


def ask(line: Line, address: str, setting: WireSetting) -> None:
    """Keep so many messages on their way, and say how many were answered a second."""
    import numpy as np

    from paramserver.protocol.messages import BlockUpdate, Pulled, Push
    from paramserver.protocol.shared import OFFER_BYTES
    from paramserver.protocol.transport import Received
    from paramserver.protocol.zeromq import ZeroMQTransport

    transport = ZeroMQTransport()
    channel = transport.connect(address)
    ours = np.zeros(setting.frame_bytes, np.uint8)
    theirs = np.empty(max(setting.frame_bytes, OFFER_BYTES), np.uint8)

    def send(frame: Any) -> None:
        updates = (BlockUpdate(0, 1, 0, "fp32"),) if frame.size else ()
        push = Push(request=1, job="bench", term=1, worker="worker-0", incarnation=1, step=1, updates=updates)
        channel.send(push, [frame.data] if frame.size else [])

    def take() -> None:
        received = channel.receive(ANSWER_SECONDS)
        if not isinstance(received, Received) or not isinstance(received.message, Pulled):
            raise MeasurementError(f"no answer to a message of {setting.frame_bytes} bytes: {received}")
        for frame in received.frames:
            theirs[: len(frame)] = np.frombuffer(frame, np.uint8)

    if setting.is_memory_shared:
        # The first large message makes the channel offer memory; small ones use it from then on.
        for _ in range(2):
            send(np.zeros(OFFER_BYTES, np.uint8))
            take()
        if channel.memory() is None:
            raise MeasurementError("two processes of this machine could not share memory; measure sockets alone")
    _pipelined(lambda: send(ours), take, setting.in_flight, setting.seconds / 5)
    line.say(_pipelined(lambda: send(ours), take, setting.in_flight, setting.seconds))
    channel.close()
    transport.close()


def _pipelined(send: Callable[[], None], take: Callable[[], None], in_flight: int, seconds: float) -> float:
    """Round trips a second with so many on their way; none is left at the end."""
    for _ in range(in_flight):
        send()
    started, count = time.perf_counter(), 0
    while True:
        take()
        count += 1
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            break
        send()
    for _ in range(in_flight - 1):
        take()
    return count / elapsed
