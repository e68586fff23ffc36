"""One real coordinator process on free ports, spoken to over ZeroMQ and HTTP."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import psutil
import pytest

from paramserver.protocol.messages import Heartbeat, Message, Orders, Refusal, Register, Registered, WorkerReport
from paramserver.protocol.transport import Channel, Received
from paramserver.protocol.zeromq import ZeroMQTransport

JOB = "name: j\nmodel: {family: recurrent, args: {task: char-lm}}\ndata: {name: python-source}\n"


class Process:
    """A coordinator in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.ready: dict[str, Any] = {}

    def start(self, *extra: str) -> None:
        ready = self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "paramserver.coordinator", "--runs", str(self.folder / "runs")]
        command += ["--state", str(self.folder / "state"), "--ready-file", str(ready), *extra]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.wait(ready.exists, "ready file")
        self.ready = json.loads(ready.read_text())

    def wait(self, is_over: Callable[[], bool], what: str) -> None:
        assert self.process is not None
        deadline = monotonic() + 30
        while not is_over():
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert monotonic() < deadline, f"no {what} within 30 s"
            try:
                self.process.wait(0.02)
            except subprocess.TimeoutExpired:
                pass

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(20)

    def http(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return httpx.request(method, self.ready["http"] + path, timeout=20, **arguments)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path)
    process.start()
    yield process
    if process.process is not None and process.process.poll() is None:
        process.process.kill()
        process.process.wait(20)


def ask(address: str, message: Message) -> Message:
    transport = ZeroMQTransport()
    channel = transport.connect(address)
    channel.send(message)
    received = channel.receive(10.0)
    transport.close()
    assert received is not None
    return received.message  # type: ignore[union-attr]


def test_ready_file_names_bound_sockets_and_sigterm_ends_with_0(coordinator: Process) -> None:
    assert coordinator.process is not None
    assert coordinator.ready["pid"] == coordinator.process.pid
    assert coordinator.http("GET", "/healthz").json() == {"status": "ok"}
    answer = ask(coordinator.ready["control"], Register(role="worker", name="w"))
    assert isinstance(answer, Registered)
    assert [session["name"] for session in coordinator.http("GET", "/api/status").json()["sessions"]] == ["w"]
    assert coordinator.stop() == 0


def test_wrong_version_is_refused_over_the_wire(coordinator: Process) -> None:
    answer = ask(coordinator.ready["control"], Register(role="worker", name="w", version=99))
    assert isinstance(answer, Refusal)
    assert answer.code == "wrong-version"


def test_jobs_are_queued_listed_cancelled_and_survive_sigkill(coordinator: Process) -> None:
    first = coordinator.http("POST", "/api/jobs", content=JOB).json()
    assert first["id"] == "j"
    assert "found 0 shards and 0 workers, the job needs 2 and 2" in first["warnings"][-1]
    second = coordinator.http("POST", "/api/jobs", content=JOB)
    assert (second.status_code, second.json()["id"]) == (201, "j-2")
    assert coordinator.http("DELETE", "/api/jobs/j-2").status_code == 200
    assert coordinator.http("DELETE", "/api/jobs/j-2").status_code == 409
    assert coordinator.http("DELETE", "/api/jobs/j-3").status_code == 404
    assert coordinator.http("GET", "/api/jobs/j/model").status_code == 409
    assert (coordinator.folder / "runs" / "j" / "job.yaml").exists()
    assert json.loads((coordinator.folder / "runs" / "j-2" / "result.json").read_text())["state"] == "cancelled"
    coordinator.stop(signal.SIGKILL)
    coordinator.start()
    states = {job["id"]: job["state"] for job in coordinator.http("GET", "/api/jobs").json()}
    assert states == {"j": "queued", "j-2": "cancelled"}
    assert coordinator.http("POST", "/api/jobs", content=JOB).json()["id"] == "j-3"
    assert "waiting for shards (0 of 2" in coordinator.http("GET", "/api/jobs/j").json()["waiting"]


def test_bad_submissions_are_422_with_the_reason(coordinator: Process) -> None:
    for content, text in (
        ("name: x", "model: missing"),
        (JOB.replace("recurrent", "recurent"), "did you mean 'recurrent'"),
        (JOB.replace("name: python-source", "name: text-file, path: /etc/passwd"), "--data-root"),
    ):
        answer = coordinator.http("POST", "/api/jobs", content=content)
        assert answer.status_code == 422
        assert text in answer.json()["error"]


def test_random_bytes_at_its_sockets_leave_it_serving(coordinator: Process) -> None:
    dice = random.Random(1)
    for address in (coordinator.ready["control"], coordinator.ready["http"]):
        host, port = address.rpartition("/")[2].split(":")
        for size in (0, 1, 64, 5000, 200_000):
            with socket.create_connection((host, int(port)), timeout=5) as raw:
                try:
                    raw.sendall(dice.randbytes(size))
                except OSError:
                    pass  # it hung up on us, as it may
    assert coordinator.http("GET", "/healthz").status_code == 200
    assert isinstance(ask(coordinator.ready["control"], Register(role="worker", name="w")), Registered)


def test_idle_process_uses_next_to_no_cpu(coordinator: Process) -> None:
    coordinator.http("GET", "/api/status")
    process = psutil.Process(coordinator.ready["pid"])
    before, started = sum(process.cpu_times()[:2]), monotonic()
    coordinator.wait(lambda: monotonic() - started > 3.0, "end of the measurement")
    assert (sum(process.cpu_times()[:2]) - before) / (monotonic() - started) < 0.03


def test_port_in_use_and_folder_in_use_end_it_with_a_clear_line(coordinator: Process, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    taken = coordinator.ready["http"].removeprefix("http://")
    refused = []
    for arguments, text in (
        (["--state", str(other / "1"), "--http", taken], "choose another port"),
        (["--state", str(other / "2"), "--listen", coordinator.ready["control"]], "in use"),
        (["--state", str(tmp_path / "state")], "another coordinator may be running"),
    ):
        command = [sys.executable, "-m", "paramserver.coordinator", "--runs", str(other), *arguments]
        command += ["--ready-file", str(other / "ready")]
        refused.append((subprocess.Popen(command, stderr=subprocess.PIPE, text=True), text))
    for process, text in refused:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert text in errors
        assert "Traceback" not in errors
    assert not (other / "ready").exists()


def test_a_session_lasts_as_long_as_the_operator_says_and_has_six_heartbeats(coordinator: Process) -> None:
    coordinator.stop()
    coordinator.start("--session-seconds", "1.2")
    answer = ask(coordinator.ready["control"], Register(role="worker", name="w"))
    assert isinstance(answer, Registered)
    assert (answer.session_seconds, answer.heartbeat_seconds) == (1.2, pytest.approx(0.2))
    started = monotonic()
    coordinator.wait(lambda: not coordinator.http("GET", "/api/status").json()["sessions"], "end of the session")
    assert monotonic() - started < 10


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e9", "three"])
def test_a_session_length_that_cannot_work_is_refused_with_what_is_allowed(tmp_path: Path, seconds: str) -> None:
    command = [sys.executable, "-m", "paramserver.coordinator", "--runs", str(tmp_path), "--state", str(tmp_path)]
    command += ["--ready-file", str(tmp_path / "ready"), f"--session-seconds={seconds}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "allowed are 0.5 to 3600 seconds" in ended.stderr


def test_members_are_told_to_end_by_a_command_and_not_by_a_stop_of_the_coordinator(coordinator: Process) -> None:
    transport = ZeroMQTransport()
    channel = transport.connect(coordinator.ready["control"])
    channel.send(Register(role="worker", name="w"))
    registered = channel.receive(10.0)
    assert isinstance(registered, Received)
    assert isinstance(registered.message, Registered)
    beat = Heartbeat(name="w", incarnation=registered.message.incarnation, seen=0, report=WorkerReport())
    channel.send(beat)
    assert not _orders(channel).shutdown
    assert coordinator.http("POST", "/api/shutdown").json() == {"told": ["w"]}
    assert _orders(channel).shutdown
    assert coordinator.stop() == 0
    assert _orders(channel).shutdown, "once more, for whoever has joined since"
    transport.close()


def test_a_stopped_coordinator_that_goes_on_has_lost_nobody(coordinator: Process) -> None:
    transport = ZeroMQTransport()
    channel = transport.connect(coordinator.ready["control"])
    channel.send(Register(role="worker", name="w"))
    assert isinstance(channel.receive(10.0), Received)
    assert coordinator.process is not None
    coordinator.process.send_signal(signal.SIGSTOP)
    try:
        waited = monotonic()
        coordinator.wait(lambda: monotonic() - waited > 4.0, "the end of the stop")
    finally:
        coordinator.process.send_signal(signal.SIGCONT)
    assert [session["name"] for session in coordinator.http("GET", "/api/status").json()["sessions"]] == ["w"]
    transport.close()


def _orders(channel: Channel) -> Orders:
    received = channel.receive(10.0)
    assert isinstance(received, Received)
    assert isinstance(received.message, Orders)
    return received.message
