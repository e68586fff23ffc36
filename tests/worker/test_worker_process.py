"""A real worker process and a real shard process, under a coordinator that the test plays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from paramserver.job import parse_job
from paramserver.protocol.layout import Layout
from paramserver.protocol.messages import (
    ExportPart,
    ExportStored,
    Heartbeat,
    Lease,
    LeaseDone,
    Member,
    Orders,
    PartAddress,
    PartOrder,
    Register,
    Registered,
    ShardOrder,
    ShardReport,
    WorkerOrder,
    WorkerReport,
)
from paramserver.protocol.transport import Received
from paramserver.protocol.zeromq import ZeroMQTransport
from worker import attach

TEXT = "the quick brown fox jumps over the lazy dog. " * 400


class PlayedCoordinator:
    """Answers beats with the orders that the test sets. One thread: the test's."""

    def __init__(self, directory: Path) -> None:
        self.transport = ZeroMQTransport()
        self.listener = self.transport.listen("tcp://127.0.0.1:0")
        self.logs = directory
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.addresses: dict[str, str] = {}
        self.reports: dict[str, WorkerReport | ShardReport] = {}
        self.orders: dict[str, ShardOrder | WorkerOrder | None] = {}
        self.results: dict[int, LeaseDone] = {}
        self.exported = b""
        self._number = 0

    def start(self, module: str, name: str, *more: str) -> None:
        command = [sys.executable, "-m", module, "--coordinator", self.listener.address, "--name", name, *more]
        with (self.logs / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(command, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def serve_until(self, is_over: object, what: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not is_over():  # type: ignore[operator]
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-2000:] for path in self.logs.glob("*.log"))
                pytest.fail(f"{what}: not within {seconds} s\n{self.reports}\n{logs}")
            received = self.listener.receive(0.1)
            if isinstance(received, Received):
                self._answer(received)

    def _answer(self, received: Received) -> None:
        message = received.message
        if isinstance(message, Register):
            self.addresses[message.name] = message.address
            self.listener.send(received.peer, Registered(incarnation=1, heartbeat_seconds=0.2, session_seconds=3.0))
        elif isinstance(message, ExportPart):
            assert message.offset == len(self.exported)
            self.exported += bytes(received.frames[0])
            stored = ExportStored(job=message.job, lease=message.lease, stored=len(self.exported))
            self.listener.send(received.peer, stored)
        elif isinstance(message, Heartbeat):
            self.reports[message.name] = message.report
            done = message.report.done if isinstance(message.report, WorkerReport) else ()
            self.results.update({result.number: result for result in done})
            self._number += 1
            confirmed = tuple(result.number for result in done)
            orders = Orders(number=self._number, order=self.orders.get(message.name), confirmed=confirmed)
            self.listener.send(received.peer, orders)

    def report(self, name: str = "worker-0") -> WorkerReport:
        report = self.reports.get(name)
        return report if isinstance(report, WorkerReport) else WorkerReport()

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(10)
        self.transport.close()


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[PlayedCoordinator]:
    played = PlayedCoordinator(tmp_path)
    yield played
    played.close()


class PlayedJob:
    """A character model on a small text: one shard, one worker, stage by stage."""

    def __init__(self, coordinator: PlayedCoordinator, directory: Path, **settings: object) -> None:
        (directory / "text.txt").write_text(TEXT)
        self.coordinator = coordinator
        self.specification = parse_job(
            {
                "name": "played",
                "model": {"family": "recurrent", "args": {"task": "char-lm", "cell": "gru", "hidden": 16}},
                "data": {
                    "name": "text-file",
                    "path": str(directory / "text.txt"),
                    "batch": 4,
                    "window": 16,
                    "windows": 4,
                },
                "push": {"encoding": "int8"},
                "optimizer": {"name": "adagrad", "lr": 0.1},
                "cluster": {"shards": 1, "workers": 1},
                **settings,
            }
        ).json_text()
        self.layout: Layout | None = None
        self.placement: tuple[PartAddress, ...] = ()
        self.next_lease = 1

    def order(self, stage: str, *leases: Lease, hold: int = 1000) -> None:
        self.coordinator.orders["worker-0"] = WorkerOrder(
            job="played",
            specification=self.specification,
            stage=stage,  # type: ignore[arg-type]
            layout=self.layout,
            placement=self.placement,
            grants=leases,
            hold=hold,
        )

    def leases(self, kind: str, count: int, split: str = "train") -> list[Lease]:
        numbers = range(self.next_lease, self.next_lease + count)
        self.next_lease += count
        return [Lease(n, kind, examples=(0, 1), split=split) for n in numbers]  # type: ignore[arg-type]

    def run(self, stage: str, leases: list[Lease]) -> list[LeaseDone]:
        self.order(stage, *leases)
        numbers = [lease.number for lease in leases]
        played = self.coordinator
        played.serve_until(lambda: all(number in played.results for number in numbers), stage)
        return [played.results[number] for number in numbers]

    def place(self) -> None:
        """From nothing to a job whose blocks are initialised."""
        played = self.coordinator
        played.start("paramserver.shard", "shard-0")
        played.start("worker", "worker-0")
        (lease,) = self.leases("initialise", 1)
        self.order("initialise", lease)
        played.serve_until(lambda: played.report().layout is not None and "shard-0" in played.addresses, "a layout")
        self.layout = played.report().layout
        assert self.layout is not None
        blocks = tuple(range(len(self.layout.blocks)))
        self.placement = (PartAddress("shard-0", played.addresses["shard-0"], blocks),)
        played.orders["shard-0"] = ShardOrder(
            (
                PartOrder(
                    part="shard-0",
                    job="played",
                    specification=self.specification,
                    term=1,
                    phase=0,
                    layout=self.layout,
                    blocks=blocks,
                    members=(Member("worker-0", 1),),
                ),
            )
        )
        self.run("initialise", [lease])


def flush_event(directory: Path) -> dict[str, str]:
    """The fields of the worker's event of its flush; it held something back."""
    (line,) = [line for line in (directory / "worker-0.log").read_text().splitlines() if "residuals-flushed" in line]
    fields = dict(word.split("=", 1) for word in line.split()[1:])
    assert float(fields["norm"]) > 0
    return fields


def test_worker_runs_every_stage_of_a_job_and_learns(coordinator: PlayedCoordinator, tmp_path: Path) -> None:
    job = PlayedJob(coordinator, tmp_path)
    job.place()
    assert coordinator.report().examples.keys() == {"train", "valid", "test"} or coordinator.report().layout is None
    results = job.run("train", job.leases("train", 12))
    losses = [result.loss_sum / result.elements for result in results]
    assert losses[-1] < losses[0]
    assert all(result.steps == 4 for result in results)
    job.order("drain")
    coordinator.serve_until(lambda: coordinator.report().drained, "the drain")
    assert coordinator.report().residual_norm == 0
    assert flush_event(tmp_path)["is_last"] == "True", "nobody trains any more"
    (evaluated,) = job.run("evaluate", job.leases("evaluate", 1, "valid"))
    assert 0 < evaluated.loss_sum / evaluated.elements < losses[0]
    job.run("export", job.leases("export", 1))
    tensors = load(coordinator.exported)
    assert sum(tensor.size for tensor in tensors.values()) >= 1
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    report = coordinator.report()
    assert report.steps == 48
    assert report.push_bytes > 0
    assert report.pull_bytes > 0
    assert report.working_seconds > 0
    assert report.device in ("cpu", "cuda:0")
    coordinator.orders["worker-0"] = None
    coordinator.serve_until(lambda: coordinator.report() == WorkerReport(), "an idle worker")
    assert coordinator.processes["worker-0"].poll() is None


def test_terminated_worker_flushes_hands_back_and_exits_0(coordinator: PlayedCoordinator, tmp_path: Path) -> None:
    job = PlayedJob(coordinator, tmp_path)
    job.place()
    job.order("train", *job.leases("train", 500))
    coordinator.serve_until(lambda: coordinator.report().steps > 3, "some steps")
    worker = coordinator.processes["worker-0"]
    worker.send_signal(signal.SIGTERM)
    coordinator.serve_until(lambda: worker.poll() is not None, "the worker's end", 10.0)
    assert worker.returncode == 0
    report = coordinator.report()
    assert report.held == ()
    assert report.returned
    # The lease that it was in, and one whose last update was on its way; between two leases none.
    assert len(report.begun) <= 2
    assert set(report.begun) <= set(report.returned)
    assert report.drained
    assert report.residual_norm == 0
    assert flush_event(tmp_path)["is_last"] == "False", "others may train on"


def test_job_taken_away_in_the_middle_of_training_and_given_back_goes_on(
    coordinator: PlayedCoordinator, tmp_path: Path
) -> None:
    job = PlayedJob(coordinator, tmp_path)
    job.place()
    job.order("train", *job.leases("train", 500))
    coordinator.serve_until(lambda: coordinator.report().steps > 3, "some steps")
    coordinator.orders["worker-0"] = None
    coordinator.serve_until(lambda: coordinator.report() == WorkerReport(), "an idle worker")
    job.order("train", *job.leases("train", 500))
    coordinator.serve_until(lambda: coordinator.report().steps > 3 or bool(coordinator.report().failed), "more steps")
    assert coordinator.report().failed == ""

    def refusals() -> dict[str, int]:
        report = coordinator.reports["shard-0"]
        assert isinstance(report, ShardReport)
        return report.parts[0].refusals

    assert job.layout is not None
    blocks = len(job.layout.blocks)
    coordinator.serve_until(lambda: refusals().get("out-of-order", 0) >= blocks, "each block to be asked about")


def test_surplus_over_hold_is_handed_back_while_training(coordinator: PlayedCoordinator, tmp_path: Path) -> None:
    job = PlayedJob(coordinator, tmp_path)
    job.place()
    leases = job.leases("train", 500)
    job.order("train", *leases)
    coordinator.serve_until(lambda: len(coordinator.report().held) > 100, "leases held")
    job.order("train", *leases, hold=2)
    coordinator.serve_until(lambda: len(coordinator.report().held) <= 2, "the surplus")
    report = coordinator.report()
    assert set(report.returned).isdisjoint(report.held)
    assert len(report.returned) > 100


def test_job_that_this_worker_cannot_build_fails_and_the_worker_lives(
    coordinator: PlayedCoordinator, tmp_path: Path
) -> None:
    job = PlayedJob(coordinator, tmp_path)
    (tmp_path / "text.txt").unlink()
    coordinator.start("worker", "worker-0")
    job.order("initialise", *job.leases("initialise", 1))
    coordinator.serve_until(lambda: coordinator.report().failed != "", "a failure")
    assert "text.txt" in coordinator.report().failed
    coordinator.orders["worker-0"] = None
    coordinator.serve_until(lambda: coordinator.report() == WorkerReport(), "an idle worker")
    assert coordinator.processes["worker-0"].poll() is None


def test_wrong_address_is_one_clear_line_and_a_non_zero_exit() -> None:
    command = [sys.executable, "-m", "worker", "--coordinator", "nowhere", "--name", "worker-0"]
    ended = subprocess.run(command, capture_output=True, timeout=60, text=True)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "nowhere" in ended.stderr


def test_any_script_trains_through_attach(coordinator: PlayedCoordinator, tmp_path: Path) -> None:
    import torch

    from worker.replica import Replica
    from worker.stages import from_module

    torch.manual_seed(0)
    model = torch.nn.Linear(5, 1)
    inputs = torch.randn(64, 5)
    targets = inputs @ torch.ones(5, 1)
    layout = Replica(from_module(dict(model.named_parameters()))).layout
    coordinator.start("paramserver.shard", "shard-0")
    blocks = tuple(range(len(layout.blocks)))
    coordinator.orders["shard-0"] = ShardOrder(
        (
            PartOrder(
                part="shard-0",
                job="script",
                specification=json.dumps(
                    {"name": "script", "model": {"family": "recurrent"}, "optimizer": {"name": "sgd", "lr": 0.1}}
                ),
                term=1,
                phase=0,
                layout=layout,
                blocks=blocks,
            ),
        )
    )

    def is_taken() -> bool:
        report = coordinator.reports.get("shard-0")
        return isinstance(report, ShardReport) and [part.job for part in report.parts] == ["script"]

    coordinator.serve_until(is_taken, "a shard with the job")
    shards = [PartAddress("shard-0", coordinator.addresses["shard-0"], blocks)]
    with attach(model, shards, job="script", worker="mine") as attached:
        attached.initialise()
        attached.pull()
        losses = []
        for _ in range(60):
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            attached.push({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
