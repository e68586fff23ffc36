"""Two shard processes that back each other up, a coordinator that the test plays, and real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest

from paramserver.protocol.layout import Parameter, cut_layout
from paramserver.protocol.messages import (
    BlockUpdate,
    Heartbeat,
    Hello,
    Initialise,
    Initialised,
    Message,
    Orders,
    Partner,
    PartOrder,
    PartReport,
    Pull,
    Pulled,
    Push,
    Pushed,
    Register,
    Registered,
    ShardOrder,
    ShardReport,
    Want,
    Welcome,
)
from paramserver.protocol.transport import Channel, Received
from paramserver.protocol.zeromq import ZeroMQTransport

LAYOUT = cut_layout([Parameter("a", (64, 64), "first")])
ELEMENTS = LAYOUT.blocks[0].elements
PART = "s0"
ANSWER_SECONDS = 60.0  # a first start compiles kernels


def part_order(term: int, role: Any, partner: Partner | None) -> PartOrder:
    specification = {
        "name": "job",
        "model": {"family": "recurrent"},
        "optimizer": {"name": "sgd", "lr": 1.0},
        "push": {"encoding": "fp32"},
        "pull": {"encoding": "fp32"},
        "durability": {"log": "journal"},
    }
    return PartOrder(
        part=PART, job="job", specification=json.dumps(specification), term=term, phase=0, layout=LAYOUT,
        blocks=(0,), role=role, partner=partner,
    )  # fmt: skip


class Cluster:
    """The shard processes, what they last reported, and what each is told at its next heartbeat."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.transport = ZeroMQTransport()
        self.listener = self.transport.listen("tcp://127.0.0.1:0")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.addresses: dict[str, str] = {}
        self.reports: dict[str, dict[str, PartReport]] = {}
        self.orders: dict[str, PartOrder | None] = {}
        self.numbers = count(1)
        self.unanswered: set[str] = set()  # who gets no orders for now
        self.worker = self.requests = 0
        self.channels: list[Channel] = []

    def start(self, name: str) -> None:
        arguments = ["--name", name, "--coordinator", self.listener.address, "--state", str(self.state)]
        self.processes[name] = subprocess.Popen([sys.executable, "-m", "paramserver.shard", *arguments])
        self.orders[name] = None
        self.until(f"{name} to register", lambda: name in self.addresses)

    def coordinate(self) -> None:
        while isinstance(received := self.listener.receive(0.01), Received):
            message = received.message
            if isinstance(message, Register):
                self.addresses[message.name] = message.address
                answer: Message = Registered(incarnation=1, heartbeat_seconds=0.05, session_seconds=3.0)
                self.listener.send(received.peer, answer)
            elif isinstance(message, Heartbeat):
                assert isinstance(message.report, ShardReport)
                self.reports[message.name] = {report.part: report for report in message.report.parts}
                if message.name not in self.unanswered:
                    order = self.orders[message.name]
                    shard_order = ShardOrder(() if order is None else (order,))
                    self.listener.send(received.peer, Orders(number=next(self.numbers), order=shard_order))

    def until(self, what: str, is_so: Callable[[], bool]) -> None:
        deadline = monotonic() + ANSWER_SECONDS
        while not is_so():
            assert monotonic() < deadline, f"waited in vain for {what}: {self.reports}"
            self.coordinate()

    def report(self, name: str) -> PartReport:
        return self.reports.get(name, {}).get(PART, PartReport(part=PART, job=""))

    def partner(self, name: str, is_synced: bool = False) -> Partner:
        return Partner(name, 1, self.addresses[name], is_synced=is_synced)

    def pair(self, primary: str, backup: str, term: int) -> None:
        """Make these two a primary and its backup in step, as the coordinator does: first in step, then recorded."""
        for is_synced in (False, True):
            self.orders[primary] = part_order(term, "primary", self.partner(backup, is_synced))
            self.orders[backup] = part_order(term, "backup", self.partner(primary, is_synced))
            self.until(f"{backup} to be in step", lambda: self.report(primary).is_synced)

    def connect(self, name: str, term: int) -> Client:
        return Client(self, name, term)

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait(ANSWER_SECONDS)
        for channel in self.channels:
            channel.close()
        self.transport.close()


class Client:
    """One worker's connection to one shard."""

    def __init__(self, cluster: Cluster, name: str, term: int) -> None:
        self.cluster, self.term = cluster, term
        self.channel = cluster.transport.connect(cluster.addresses[name])
        cluster.channels.append(self.channel)
        self.said: list[tuple[Message, list[bytes]]] = []
        hello = Hello(worker="w0", incarnation=1, job="job", layout=LAYOUT.fingerprint, part=PART)
        welcome, _ = self.ask(hello, [], Welcome)
        assert welcome.term == term

    def hear(self) -> None:
        while isinstance(received := self.channel.receive(0), Received):
            self.said.append((received.message, [bytes(frame) for frame in received.frames]))

    def answer(self, kind: type[Message]) -> tuple[Any, list[bytes]]:
        self.cluster.until(kind.__name__, lambda: self.hear() or bool(self.said))
        message, frames = self.said.pop(0)
        assert isinstance(message, kind), message
        return message, frames

    def ask(self, message: Message, frames: list[bytes], kind: type[Message]) -> tuple[Any, list[bytes]]:
        self.channel.send(message, frames)
        return self.answer(kind)

    def head(self, step: int) -> dict[str, Any]:
        self.cluster.requests += 1
        return {"request": self.cluster.requests, "job": "job", "term": self.term, "worker": "w0", "incarnation": 1,
                "step": step}  # fmt: skip

    def initialise(self) -> None:
        first = Initialise(request=0, job="job", term=self.term, layout=LAYOUT.fingerprint, blocks=(0,))
        self.ask(first, [bytes(4 * ELEMENTS)], Initialised)

    def push(self, sequence: int) -> tuple[Push, list[bytes]]:
        """An update that adds `sequence` to every weight."""
        update = BlockUpdate(0, sequence, 0, "fp32")
        return Push(**self.head(sequence), updates=(update,)), [np.full(ELEMENTS, -sequence, np.float32).tobytes()]

    def weights(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        _, frames = self.ask(Pull(**self.head(0), wants=(Want(0),), source="weights"), [], Pulled)
        return np.frombuffer(frames[0], np.float32)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        made.start("s0")
        made.start("s1")
        made.orders["s0"] = part_order(1, "primary", None)
        made.until("s0 to serve", lambda: made.report("s0").blocks == 1)
        yield made
    finally:
        made.close()


def signalled(cluster: Cluster, name: str, number: signal.Signals) -> None:
    os.kill(cluster.processes[name].pid, number)


def test_a_backup_serves_on_where_a_killed_primary_was_with_nothing_lost_or_doubled(cluster: Cluster) -> None:
    first = cluster.connect("s0", 1)
    first.initialise()
    first.ask(*first.push(1), Pushed)  # before there is a backup: it comes in its snapshot or records
    cluster.pair("s0", "s1", 1)
    for sequence in range(2, 20):
        pushed, _ = first.ask(*first.push(sequence), Pushed)
        assert pushed.acknowledged[0].version == sequence
    first.channel.send(*first.push(20))  # nobody will ever know whether it was taken
    signalled(cluster, "s0", signal.SIGKILL)
    cluster.processes["s0"].wait(ANSWER_SECONDS)
    cluster.orders["s1"] = part_order(2, "primary", None)
    cluster.until("s1 to serve", lambda: cluster.report("s1").role == "primary" and cluster.report("s1").term == 2)
    second = cluster.connect("s1", 2)
    pushed, _ = second.ask(*second.push(20), Pushed)
    assert pushed.acknowledged[0].version == 20
    pushed, _ = second.ask(*second.push(19), Pushed)
    assert pushed.acknowledged[0].duplicate
    np.testing.assert_array_equal(second.weights(), np.full(ELEMENTS, sum(range(1, 21)), np.float32))


def test_a_primary_that_wakes_after_its_backup_was_promoted_acknowledges_nothing(cluster: Cluster) -> None:
    first = cluster.connect("s0", 1)
    first.initialise()
    cluster.pair("s0", "s1", 1)
    first.ask(*first.push(1), Pushed)
    signalled(cluster, "s0", signal.SIGSTOP)
    first.channel.send(*first.push(2))
    cluster.unanswered.add("s0")
    cluster.orders["s1"] = part_order(2, "primary", None)
    cluster.until("s1 to serve", lambda: cluster.report("s1").role == "primary")
    second = cluster.connect("s1", 2)
    second.ask(*second.push(2), Pushed)
    second.ask(*second.push(3), Pushed)
    before = cluster.report("s0").record
    signalled(cluster, "s0", signal.SIGCONT)
    cluster.until("s0 to take the push that waited for it", lambda: cluster.report("s0").record > before)
    cluster.until("s0 to say what it waits for", lambda: "wrong-term" in cluster.report("s0").waiting_for)
    first.hear()
    assert first.said == [], "an update was acknowledged by a shard that is no primary any more"
    # It comes back as the backup: what it applied alone is gone, and what was acknowledged elsewhere is there.
    cluster.unanswered.clear()
    cluster.pair("s1", "s0", 3)
    cluster.orders["s0"] = part_order(4, "primary", None)
    cluster.orders["s1"] = None
    cluster.until("s0 to serve", lambda: cluster.report("s0").role == "primary" and cluster.report("s0").term == 4)
    third = cluster.connect("s0", 4)
    np.testing.assert_array_equal(third.weights(), np.full(ELEMENTS, 1 + 2 + 3, np.float32))


def test_while_the_backup_is_stopped_nothing_is_acknowledged_and_the_report_says_so(cluster: Cluster) -> None:
    client = cluster.connect("s0", 1)
    client.initialise()
    cluster.pair("s0", "s1", 1)
    signalled(cluster, "s1", signal.SIGSTOP)
    client.channel.send(*client.push(1))
    cluster.until("s0 to say what it waits for", lambda: "s1" in cluster.report("s0").waiting_for)
    client.hear()
    assert client.said == []
    # The coordinator's grant to go on alone: an order without a partner.
    cluster.orders["s0"] = part_order(1, "primary", None)
    pushed, _ = client.answer(Pushed)
    assert pushed.acknowledged[0].version == 1
    cluster.until("s0 to wait for nobody", lambda: cluster.report("s0").waiting_for == "")
