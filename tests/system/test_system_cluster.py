"""A cluster that stays, from `up` to `down`, as a user works with it."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Commands = Callable[..., Any]
Job = Callable[..., Path]
Processes = Callable[[], list[Any]]
Poll = Callable[..., Any]

SMALL = ("--shards", 1, "--workers", 1, "--http", "127.0.0.1:0")


@pytest.mark.timeout(300)
def test_up_submit_status_cancel_export_down(
    paramserver: Commands, tiny_job: Job, processes: Processes, poll: Poll
) -> None:
    up = paramserver("up", *SMALL, "--json").json()
    assert os.path.samefile(up["runs"], paramserver.home / "runs")

    again = paramserver("up", *SMALL)
    assert again.code == 2
    for part in (str(up["pid"]), up["url"], "paramserver down"):
        assert part in again.err

    first = paramserver("submit", tiny_job("first")).out.strip()
    assert paramserver("submit", tiny_job("second", epochs=100), "--json").json()["id"] == "second"
    assert [job["id"] for job in paramserver("jobs", "--json").json()] == ["second", "first"]
    status = paramserver("status", "--json").json()
    assert {session["name"] for session in status["sessions"]} == {"shard-0", "worker-0"}
    assert paramserver("export", "second", "--to", "x.safetensors").code == 2

    def state(job: str) -> Any:
        return {one["id"]: one["state"] for one in paramserver("jobs", "--json").json()}[job]

    poll("the first job to end", lambda: state(first) == "done", 100, 0.5)
    shown = paramserver("status", first)
    assert "validation loss" in shown.out, shown.out + shown.err
    poll("the second job to train", lambda: state("second") == "training", 60, 0.5)
    assert "second" in paramserver("status").out

    assert paramserver("export", first, "--to", "model.safetensors").code == 0
    assert (paramserver.directory / "model.safetensors").stat().st_size > 1000
    assert not list(paramserver.directory.glob("*.part"))

    assert paramserver("cancel", "second").code == 0
    assert state("second") == "cancelled"
    assert "cancelled" in paramserver("cancel", "second").err
    assert "no job 'third'" in paramserver("cancel", "third").err
    assert "role=worker" in paramserver("logs", "worker-0").out

    assert paramserver("down").code == 0
    assert processes() == []
    assert json.loads((paramserver.home / "runs" / "first" / "result.json").read_text())["state"] == "done"
    assert "role=worker" in paramserver("logs", "worker-0").out


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_queue_survives_down_and_up(paramserver: Commands, tiny_job: Job, poll: Poll) -> None:
    assert paramserver("up", *SMALL).code == 0
    paramserver("submit", tiny_job("waiting", workers=2))
    assert "waiting for" in paramserver("jobs").out
    assert paramserver("down").code == 0
    assert paramserver("up", "--shards", 1, "--workers", 2, "--http", "127.0.0.1:0").code == 0
    poll("the job to be done", lambda: paramserver("jobs", "--json").json()[0]["state"] == "done", 100, 0.5)
    assert paramserver("down").code == 0


@pytest.mark.timeout(240)
def test_a_job_that_the_cluster_refuses_is_told(paramserver: Commands, tiny_job: Job) -> None:
    assert paramserver("up", *SMALL).code == 0
    path = tiny_job("outside")
    path.write_text(path.read_text().replace("name: python-source,", "name: text-file, path: /etc/hostname,"))
    refused = paramserver("submit", path)
    assert refused.code == 2
    assert "data" in refused.err
    assert refused.out == ""
    assert paramserver("jobs").out == ""


def test_a_taken_port_is_told_and_nothing_is_left(paramserver: Commands, processes: Processes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = paramserver("up", "--http", address)
    assert done.code == 1
    assert address in done.err
    assert "--http" in done.err
    assert processes() == []
    assert "no cluster runs" in paramserver("status").err


@pytest.mark.timeout(240)
def test_a_killed_supervisor_leaves_no_process_and_no_lock(
    paramserver: Commands, processes: Processes, poll: Poll
) -> None:
    up = paramserver("up", *SMALL, "--json").json()
    os.kill(up["pid"], signal.SIGKILL)
    poll("the processes to end", lambda: not processes(), 20)
    assert "no cluster runs" in paramserver("status").err
    assert paramserver("up", *SMALL).code == 0


@pytest.mark.timeout(240)
def test_a_dead_process_is_started_again_and_status_says_so(paramserver: Commands, poll: Poll) -> None:
    assert paramserver("up", *SMALL).code == 0
    status = paramserver("status", "--json").json()
    worker = next(session for session in status["sessions"] if session["name"] == "worker-0")
    os.kill(worker["pid"], signal.SIGKILL)

    def told() -> bool:
        shown = paramserver("status").err
        return "worker-0 was killed (SIGKILL)" in shown and "started again" in shown

    poll("the death and the start to be reported", told, 20, 0.3)
    (death,) = json.loads((paramserver.home / "cluster.json").read_text())["deaths"]
    assert (death["name"], death["outcome"]) == ("worker-0", "started again")

    def successor() -> Any:
        sessions = paramserver("status", "--json").json()["sessions"]
        return [one for one in sessions if one["name"] == "worker-0" and one["pid"] != worker["pid"]]

    (found,) = poll("the successor to join", successor, 30, 0.3)
    assert found["incarnation"] == worker["incarnation"] + 1


@pytest.mark.timeout(240)
def test_ctrl_c_during_up_leaves_nothing(paramserver: Commands, processes: Processes, poll: Poll) -> None:
    with paramserver.start("up", *SMALL) as process:
        poll("the supervisor to start", lambda: len(processes()) >= 3, 30)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
    assert processes() == []
