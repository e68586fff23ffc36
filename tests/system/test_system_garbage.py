"""Real processes under garbage, and under a peer that reads nothing: memory stays bounded, the job goes on."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zmq

from deploy.api import Api
from deploy.local import LocalCluster
from paramserver.protocol.backlog import UNREAD_BYTES
from paramserver.protocol.framing import encode_message
from paramserver.protocol.layout import Parameter, cut_layout
from paramserver.protocol.messages import (
    BlockUpdate,
    ExportPart,
    Heartbeat,
    Hello,
    Initialise,
    Initialised,
    Message,
    Orders,
    PartOrder,
    Pull,
    Pulled,
    Push,
    Register,
    Registered,
    ShardOrder,
    Tick,
    Want,
    Welcome,
    WorkerReport,
)
from paramserver.protocol.transport import Received
from paramserver.protocol.zeromq import ZeroMQChannel, ZeroMQTransport

DAY = 86_400  # one refused message a second for 24 hours
ROUNDS = 48
GROWTH_BYTES = 24 * 2**20  # of a process over the day; what the allocator keeps is in it


def rss(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def garbage(seed: int, count: int) -> list[list[bytes]]:
    """Messages that are refused by a shard that serves another job and by a coordinator, of all kinds."""
    generator = random.Random(seed)
    name = f"stranger-{seed}"
    noise = generator.randbytes(3000)
    frame = generator.randbytes(100_000)
    update = BlockUpdate(0, 1, 0, "int4/64")
    wants = tuple(Want(block) for block in range(2000))
    heads = [
        Hello(worker=name, incarnation=1, job="job", layout="other", part="shard-0"),
        Hello(version=99, worker=name, incarnation=1, job="job", layout="other", part="shard-0"),
        Tick(job="job", worker=name, incarnation=1, step=1),
        Pull(request=1, job="job", term=1, worker=name, incarnation=1, step=1, wants=wants),
        Heartbeat(name=name, incarnation=1, seen=0, report=WorkerReport(held=tuple(range(2000)))),
        Register(version=99, role="worker", name=name),
        Register(role="shard", name=name),
    ]
    whole: list[list[bytes]] = [[bytes(part) for part in encode_message(head)] for head in heads]
    push = Push(request=1, job="job", term=1, worker=name, incarnation=1, step=1, updates=(update,))
    part = ExportPart(name=name, incarnation=1, job="job", lease=1, offset=0, total=9)
    whole += [[bytes(part) for part in encode_message(message, [frame])] for message in (push, part)]
    whole += [[noise], [b""], [b"\xc1" + noise], [whole[0][0], b"x", b"y"], [whole[0][0][:-1]], [b"\x90"] * 50]
    return [generator.choice(whole) for _ in range(count)]


def replay(address: str, seed: int, count: int) -> None:
    """Send garbage over one connection as fast as it is taken; nothing that is answered is read."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.DEALER) as raw:
        raw.linger, raw.rcvhwm, raw.sndtimeo = 20_000, 1, 20_000
        raw.connect(address)
        for parts in garbage(seed, count):
            raw.send_multipart(parts)
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    for _ in range(10):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(os.urandom(100))


@pytest.mark.timeout(300)
def test_a_day_of_refused_garbage_replayed_fast_grows_no_memory_and_stops_no_job(
    local_cluster: Callable[..., LocalCluster], tiny_job: Callable[..., Path], poll: Callable[..., Any]
) -> None:
    cluster = local_cluster()
    with Api(cluster.url, timeout_seconds=60) as api:
        job = api.submit(tiny_job(epochs=100_000).read_text())["id"]
        poll("training", lambda: api.job(job)["state"] == "training")
        shard = next(one["address"] for one in api.status()["sessions"] if one["role"] == "shard")
        before: dict[str, int] = {}
        for number in range(ROUNDS):
            for address in (shard, cluster.control):
                replay(address, number, DAY // ROUNDS // 2)
            if number == ROUNDS // 8:  # what a process takes once: code, buffers, arenas of the allocator
                before = {name: rss(cluster.pids()[name]) for name in ("shard-0", "coordinator")}
        for name, bytes_before in before.items():
            grown = rss(cluster.pids()[name]) - bytes_before
            assert grown < GROWTH_BYTES, f"{name} grew by {grown:,} bytes"
        found = api.status()
        steps = found["job"]["steps"]
        poll("the job to go on", lambda: api.status()["job"]["steps"] > steps)
        # It was seen: refused, or ignored without a look once a connection had worn out all patience. Of what an
        # unread connection still carries when it is closed, the system throws away some.
        counted = api.status()
        for refusals in (counted["refusals"], counted["job"]["refusals"]):
            assert sum(refusals.values()) > DAY // 4
            assert refusals["malformed"] > ROUNDS
            assert refusals["ignored"] > DAY // 16
        assert counted["handshake_failures"] >= ROUNDS


class Coordinator:
    """As much of a coordinator as makes a real shard process serve one job."""

    def __init__(self, order: PartOrder) -> None:
        self.transport = ZeroMQTransport()
        self.listener = self.transport.listen("tcp://127.0.0.1:0")
        self.order = order
        self.address = ""
        self.dropped = 0

    def serve(self) -> None:
        while (received := self.listener.receive(0.02)) is not None:
            assert isinstance(received, Received)
            match received.message:
                case Register() as register:
                    self.address = register.address
                    answer: Message = Registered(incarnation=1, heartbeat_seconds=0.2, session_seconds=3.0)
                case Heartbeat() as beat:
                    self.dropped = beat.report.dropped  # type: ignore[union-attr]
                    answer = Orders(number=beat.seen + 1, order=ShardOrder((self.order,)))
                case _:
                    raise AssertionError(received.message)
            self.listener.send(received.peer, answer)


MODEL = cut_layout([Parameter("weights", (8 * 2**18,), "all")])  # 8 blocks of 1 MiB


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    specification = {
        "name": "job",
        "model": {"family": "recurrent"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "push": {"encoding": "fp32"},
        "pull": {"encoding": "fp32"},
    }
    order = PartOrder(
        part="shard-0",
        job="job",
        specification=json.dumps(specification),
        term=1,
        phase=0,
        layout=MODEL,
        blocks=tuple(range(len(MODEL.blocks))),
    )
    made = Coordinator(order)
    yield made
    made.transport.close()


@pytest.mark.parametrize("sharing", ["on", "off"])
def test_worker_that_never_reads_its_answers_grows_no_memory_of_the_shard(
    coordinator: Coordinator,
    sharing: str,
    tmp_path: Path,
    processes: object,
    poll: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PARAMSERVER_SHARED_MEMORY", sharing)
    address = coordinator.listener.address
    with (tmp_path / "log").open("wb") as log:
        shard = subprocess.Popen(
            [sys.executable, "-P", "-m", "paramserver.shard", "--name", "shard-0", "--coordinator", address],
            stderr=log,
        )
    transport = ZeroMQTransport()
    try:
        poll("the shard to join", lambda: coordinator.serve() or coordinator.address)
        channel = transport.connect(coordinator.address)
        reader = transport.connect(coordinator.address)
        for name, end in (("deaf", channel), ("reader", reader)):
            hello = Hello(worker=name, incarnation=1, job="job", layout=MODEL.fingerprint, part="shard-0")
            poll("a welcome", lambda end=end, hello=hello: ask(coordinator, end, hello, Welcome))
        values = [np.full(block.elements, 0.5, np.float32).view(np.uint8).data for block in MODEL.blocks]
        for block, value in enumerate(values):
            first = Initialise(request=1, job="job", term=1, layout=MODEL.fingerprint, blocks=(block,))
            poll("first values", lambda first=first, value=value: ask(coordinator, reader, first, Initialised, [value]))
        before = rss(shard.pid)
        # 320 answers of 1 MiB: without a bound the shard would keep 256 of them.
        for number in range(320):
            channel.send(pull("deaf", number))
            if number % 16 == 15:
                coordinator.serve()
        answer = poll("the shard to serve who reads", lambda: ask(coordinator, reader, pull("reader", 1), Pulled))
        assert bytes(answer.frames[0]) == bytes(values[1])
        poll("dropped answers to be counted", lambda: coordinator.serve() or coordinator.dropped > 100)
        assert rss(shard.pid) - before < UNREAD_BYTES + 32 * 2**20

        # Nothing is lost for good: it reads what waits, asks again, and is served.
        while channel.receive(0.5) is not None:
            pass
        poll("the worker that reads again to be served", lambda: ask(coordinator, channel, pull("deaf", 7), Pulled))
    finally:
        transport.close()
        shard.terminate()
        shard.wait(30)


def pull(worker: str, number: int) -> Pull:
    wants = (Want(number % len(MODEL.blocks)),)
    return Pull(request=number, job="job", term=1, worker=worker, incarnation=1, step=0, wants=wants)


def ask(
    coordinator: Coordinator, channel: ZeroMQChannel, message: Message, expected: type[Message], frames: Any = ()
) -> Received | None:
    """The expected answer, or None where another one or none came in a moment."""
    channel.send(message, frames)
    for _ in range(5):
        coordinator.serve()
        received = channel.receive(0.1)
        if isinstance(received, Received) and isinstance(received.message, expected):
            return received
    return None
