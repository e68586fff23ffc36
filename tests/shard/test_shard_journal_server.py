"""The shard's loop with a journal: no acknowledgement before the disk has what it rests on."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import numpy as np
import pytest

from paramserver.process import StopRequest
from paramserver.protocol.layout import Parameter, cut_layout
from paramserver.protocol.messages import (
    BlockUpdate,
    Heartbeat,
    Hello,
    Initialise,
    Initialised,
    Message,
    Orders,
    PartOrder,
    PartReport,
    Push,
    Pushed,
    Register,
    Registered,
    ShardOrder,
    ShardReport,
    Welcome,
)
from paramserver.protocol.transport import Buffer, Channel, Received
from paramserver.protocol.zeromq import ZeroMQTransport
from paramserver.shard.journal.home import JournalHome
from paramserver.shard.journal.layout import JournalError, SegmentReader
from paramserver.shard.journal.records import Pushed as PushedRecord
from paramserver.shard.journal.segments import segment_name
from paramserver.shard.journal.storage import OsFile
from paramserver.shard.server import ShardServer

LAYOUT = cut_layout([Parameter("a", (8,), "first")])
ANSWER_SECONDS = 20.0


def make_order(log: str) -> PartOrder:
    specification = {
        "name": "job",
        "model": {"family": "recurrent"},
        "push": {"encoding": "fp32"},
        "pull": {"encoding": "fp32"},
        "durability": {"log": log},
    }
    return PartOrder(
        part="shard-0", job="job", specification=json.dumps(specification), term=1, phase=0, layout=LAYOUT, blocks=(0,)
    )


class Running:
    """A shard's loop in a thread of its own, a coordinator that orders one job, and a worker's channel."""

    def __init__(self, state: Path | None, log: str) -> None:
        self.transport, self.own = ZeroMQTransport(), ZeroMQTransport()
        self.coordinator = self.transport.listen("tcp://127.0.0.1:0")
        self.order, self.folder = make_order(log), state
        self.report, self.numbers = PartReport(part="shard-0", job=""), count(1)
        self.failure: BaseException | None = None
        home = None if state is None else JournalHome(state, "shard-0")
        self.server = ShardServer(
            self.own, "tcp://127.0.0.1:0", self.coordinator.address,
            Register(role="shard", name="shard-0"), home,
        )  # fmt: skip
        self.stop = StopRequest()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.worker: Channel = self.transport.connect(self.server.address)

    def _run(self) -> None:
        try:
            self.server.run(self.stop)
        except JournalError as failure:
            self.failure = failure

    def coordinate(self) -> None:
        """Answer what the shard says to its coordinator."""
        while isinstance(received := self.coordinator.receive(0.02), Received):
            if isinstance(received.message, Register):
                answer: Message = Registered(incarnation=1, heartbeat_seconds=0.05, session_seconds=3.0)
                self.coordinator.send(received.peer, answer)
            elif isinstance(received.message, Heartbeat):
                assert isinstance(received.message.report, ShardReport)
                order = None if self.order is None else ShardOrder((self.order,))
                self.report = next(iter(received.message.report.parts), PartReport(part="shard-0", job=""))
                self.coordinator.send(
                    received.peer,
                    Orders(number=next(self.numbers), order=order),
                )

    def until(self, what: str, is_so: Callable[[], bool]) -> None:
        deadline = monotonic() + ANSWER_SECONDS
        while not is_so():
            assert monotonic() < deadline, f"waited in vain for {what}"
            self.coordinate()

    def hear(self) -> Message | None:
        received = self.worker.receive(0.02)
        return received.message if isinstance(received, Received) else None

    def ask(self, message: Message, frames: Sequence[Buffer], kind: type[Message]) -> Message:
        answers: list[Message] = []
        self.worker.send(message, frames)
        self.until(kind.__name__, lambda: bool(answers.append(said) if (said := self.hear()) else answers))
        assert isinstance(answers[0], kind)
        return answers[0]

    def begin(self) -> None:
        """Serve, with a worker that has said Hello and given first values."""
        self.until("the job to be served", lambda: self.report.job == "job")
        self.ask(Hello(worker="w0", incarnation=1, job="job", layout=LAYOUT.fingerprint, part="shard-0"), (), Welcome)
        first = Initialise(request=1, job="job", term=1, layout=LAYOUT.fingerprint, blocks=(0,))
        self.ask(first, [bytes(32)], Initialised)

    def push(self, sequence: int) -> tuple[Push, list[bytes]]:
        update = BlockUpdate(0, sequence, sequence - 1, "fp32")
        head = {"request": 1 + sequence, "job": "job", "term": 1, "worker": "w0", "incarnation": 1, "step": sequence}
        return Push(**head, updates=(update,)), [np.full(8, 0.5, np.float32).tobytes()]

    def sequences_on_disk(self) -> list[int]:
        assert self.folder is not None
        data = (self.folder / "shard-0" / "job" / "shard-0" / segment_name(1)).read_bytes()
        records = [entry.record for entry in SegmentReader("segment", data, 1)]
        return [record.updates[0].sequence for record in records if isinstance(record, PushedRecord)]

    def close(self) -> None:
        self.stop.set("the test is over")
        self.thread.join(ANSWER_SECONDS)
        for endpoint in (self.worker, self.coordinator):
            endpoint.close()
        self.own.close()
        self.transport.close()
        assert not self.thread.is_alive()


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def make(state: Path | None, log: str = "journal") -> Running:
        made.append(Running(state, log))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("log", ["journal", "journal+fsync"])
def test_what_is_acknowledged_is_on_the_disk_already(log: str, running: Any, tmp_path: Path) -> None:
    shard = running(tmp_path, log)
    shard.begin()
    for sequence in (1, 2, 3):
        shard.ask(*shard.push(sequence), Pushed)
        assert shard.sequences_on_disk() == list(range(1, sequence + 1))
    shard.until("the report", lambda: shard.report.journal_bytes > 0)


def test_while_the_disk_is_full_acknowledgements_wait_and_the_report_says_so(
    running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_full, write = threading.Event(), OsFile.write

    def refuse(self: OsFile, buffers: Sequence[Buffer]) -> None:
        if is_full.is_set():
            write(self, [bytes(buffers[0])[:5]])  # a part of it gets there
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, buffers)

    monkeypatch.setattr(OsFile, "write", refuse)
    shard = running(tmp_path)
    shard.begin()
    shard.ask(*shard.push(1), Pushed)
    is_full.set()
    answers: list[Message] = []
    shard.worker.send(*shard.push(2))
    shard.until("the report of a full disk", lambda: "No space left on device" in shard.report.refusing_disk)
    shard.worker.send(*shard.push(2))
    assert shard.hear() is None
    assert shard.sequences_on_disk() == [1]
    is_full.clear()
    shard.until("two answers", lambda: bool(answers.append(said) if (said := shard.hear()) else len(answers) == 2))
    assert [answer.acknowledged[0].duplicate for answer in answers if isinstance(answer, Pushed)] == [False, True]
    assert shard.sequences_on_disk() == [1, 2]
    shard.until("the report to be quiet again", lambda: shard.report.refusing_disk == "")


def test_a_sync_that_fails_ends_the_shard_without_an_acknowledgement(
    running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = running(tmp_path, "journal+fsync")
    shard.begin()

    def fail(self: OsFile) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(OsFile, "sync", fail)
    shard.worker.send(*shard.push(1))
    shard.until("the shard to end", lambda: not shard.thread.is_alive())
    assert shard.hear() is None
    assert isinstance(shard.failure, JournalError)


def test_a_shard_without_a_folder_says_that_it_cannot_serve_a_job_with_a_journal(running: Any) -> None:
    shard = running(None)
    shard.until("the report of the failure", lambda: shard.report.failed != "")
    assert shard.report.job == "job"
    assert "start it with --state FOLDER" in shard.report.failed
    assert shard.thread.is_alive()


def test_a_job_that_is_dropped_lets_go_of_its_journal(running: Any, tmp_path: Path) -> None:
    shard = running(tmp_path)
    shard.begin()
    shard.order = None
    shard.until("the job to be dropped", lambda: shard.report.job == "")
    _, journal = JournalHome(tmp_path, "shard-0").open(msgspec.structs.replace(make_order("journal"), term=2))
    journal.close()
