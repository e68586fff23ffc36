"""A job is checkpointed, everything is killed, and another cluster goes on from what was kept."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.api import Api, ApiError
from deploy.local import LocalCluster
from paramserver.job import load_job

Make = Callable[..., LocalCluster]
Job = Callable[..., Path]
Poll = Callable[..., Any]

pytestmark = pytest.mark.timeout(300)

EXACT = """
name: exact
seed: 3
model: {model}
data: {{name: python-source, batch: 4, window: 16, windows: 4, max_chars: 60000}}
cluster: {{shards: {shards}, workers: 1}}
consistency: {{mode: {mode}}}
push: {{encoding: {push}, overlap: false}}
pull: {{encoding: ternary, still: 0}}
optimizer: {{name: {optimizer}, where: {where}, lr: 0.01}}
stop: {{epochs: 1}}
"""


def _status(cluster: LocalCluster) -> dict[str, Any]:
    with Api(cluster.url) as api:
        return dict(api.status()["job"] or {"state": "none", "steps": 0})


def _submit(cluster: LocalCluster, text: str, resume: str | None = None) -> str:
    with Api(cluster.url) as api:
        return str(api.submit(text, resume)["id"])


def _result(cluster: LocalCluster, job: str) -> dict[str, Any]:
    return dict(json.loads((cluster.topology.runs / job / "result.json").read_text()))


def _has_trained(cluster: LocalCluster, steps: int) -> Callable[[], bool]:
    return lambda: _status(cluster)["state"] == "training" and _status(cluster)["steps"] >= steps


def _checkpoint(cluster: LocalCluster, job: str, poll: Poll) -> dict[str, Any]:
    """Take one, and return the figures when it is stored."""
    with Api(cluster.url) as api:
        number = api.checkpoint(job)

    def look() -> dict[str, Any] | None:
        figures = dict(_status(cluster)["checkpoint"])
        assert f"checkpoint {number} was given up" not in figures["reason"]
        return figures if number in figures["taken"] else None

    return dict(poll("the checkpoint to be stored", look, 60))


def _kill_all(cluster: LocalCluster) -> None:
    for name in cluster.pids():
        cluster.kill(name)


def _end(cluster: LocalCluster, job: str, poll: Poll) -> dict[str, Any]:
    def is_over() -> bool:
        with Api(cluster.url) as api:
            return api.job(job)["state"] in ("done", "failed", "cancelled")

    poll("the job to end", is_over, 200, 0.3)
    result = _result(cluster, job)
    assert result["state"] == "done", result["reason"]
    return result


# What the longer ones show is shown in little by unit tests; the everyday ones are those that join it all.
@pytest.mark.parametrize("log", [pytest.param("none", marks=pytest.mark.slow), "journal"])
def test_after_everything_was_killed_another_number_of_shards_and_workers_goes_on_without_loss_or_repetition(
    log: str, tmp_path: Path, local_cluster: Make, tiny_job: Job, poll: Poll
) -> None:
    runs = tmp_path / "runs"
    first = local_cluster(shards=2, workers=3, runs=runs)
    path = tiny_job("cut", shards=2, workers=3, log=log)
    job = _submit(first, load_job(path).json_text())
    poll("the workers to train", _has_trained(first, 100), 90)
    figures = _checkpoint(first, job, poll)
    assert figures["pause_seconds"] < 10
    at_cut = _status(first)["steps"]
    poll("training to go on", _has_trained(first, at_cut + 30), 60)
    _kill_all(first)
    assert not (runs / job / "result.json").exists(), "the kill came too late to prove anything"

    second = local_cluster(shards=3, workers=2, runs=runs)
    text = load_job(tiny_job("cut", shards=3, workers=2, log=log)).json_text()
    resumed = _submit(second, text, "")
    result = _end(second, resumed, poll)
    manifest = json.loads((runs / job / "checkpoints" / "1" / "checkpoint.json").read_text())["manifest"]
    assert result["resumed_from"] == f"{job}/1"
    assert 0 < manifest["sums"]["train"]["steps"] <= at_cut
    # Every worker stopped between two leases, so nothing was begun, and every example is trained once.
    assert manifest["leases"]["begun"] == []
    assert result["examples_repeated"] == 0
    assert result["examples"] == _status(second)["examples_wanted"]
    blocks = _status(second)["blocks"]
    encoded = 4  # blocks whose residuals two workers flush at the end; biases have none
    assert result["staleness"]["all"]["updates"] == result["steps"] * blocks + 2 * encoded
    # Two workers carry the names of two of the three: the residuals of the third have no heir.
    assert result["residuals_lost"] == 1
    assert result["residuals_lost_norm"] > 0
    assert result["valid"]["bits"] < 5.0


@pytest.mark.parametrize(
    ("model", "push", "optimizer", "where", "mode"),
    [
        pytest.param(
            "{family: recurrent, args: {task: char-lm, cell: gru, hidden: 16}}",
            "int4",
            "adam",
            "server",
            "sync",
            marks=pytest.mark.slow,
        ),
        ("{family: recurrent, args: {task: char-lm, cell: lstm, hidden: 16}}", "ternary", "adam", "worker", "async"),
    ],
)
def test_with_one_worker_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(
    model: str, push: str, optimizer: str, where: str, mode: str, tmp_path: Path, local_cluster: Make, poll: Poll
) -> None:
    def text(shards: int) -> str:
        path = tmp_path / "exact.yaml"
        fields = {"model": model, "push": push, "optimizer": optimizer, "where": where, "mode": mode}
        path.write_text(EXACT.format(shards=shards, **fields), encoding="utf-8")
        return load_job(path).json_text()

    runs = tmp_path / "runs"
    cluster = local_cluster(shards=1, workers=1, runs=runs)
    unbroken = _submit(cluster, text(1))
    whole = _end(cluster, unbroken, poll)
    broken = _submit(cluster, text(1))
    poll("the worker to train", _has_trained(cluster, 60), 90)
    _checkpoint(cluster, broken, poll)
    _kill_all(cluster)
    assert not (runs / broken / "result.json").exists(), "the kill came too late to prove anything"
    other = local_cluster(shards=2, workers=1, runs=runs)
    resumed = _submit(other, text(2), broken)
    result = _end(other, resumed, poll)
    assert result["resumed_from"] == f"{broken}/1"
    assert result["steps"] == whole["steps"]
    for field in ("valid", "test"):
        assert result[field]["loss"] == whole[field]["loss"]
    assert (runs / resumed / "model.safetensors").read_bytes() == (runs / unbroken / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_worker_that_dies_while_a_checkpoint_is_taken_costs_the_checkpoint_and_not_the_training(
    tmp_path: Path, local_cluster: Make, tiny_job: Job, poll: Poll
) -> None:
    cluster = local_cluster(shards=1, workers=2)
    job = _submit(cluster, load_job(tiny_job("given-up", workers=2, epochs=20)).json_text())
    poll("the workers to train", _has_trained(cluster, 60), 90)
    os.kill(cluster.pids()["worker-1"], signal.SIGSTOP)
    with Api(cluster.url) as api:
        assert api.checkpoint(job) == 1
        poll("the cut to begin", lambda: _status(cluster)["checkpoint"]["phase"] == "gathering", 10, 0.02)
    cluster.kill("worker-1")
    given_up = poll("it to be given up", lambda: _status(cluster)["checkpoint"]["reason"], 20)
    assert "worker-1 left while it was taken" in given_up
    steps = _status(cluster)["steps"]
    poll("training to go on", _has_trained(cluster, steps + 50), 30)
    assert _checkpoint(cluster, job, poll)["taken"] == [2]
    assert sorted(path.name for path in (cluster.topology.runs / job / "checkpoints").iterdir()) == ["2"]


@pytest.mark.slow
def test_backups_of_a_run_that_goes_on_hold_what_came_from_the_checkpoint(
    tmp_path: Path, local_cluster: Make, tiny_job: Job, poll: Poll
) -> None:
    def text(steps: int) -> str:
        path = tiny_job("backed", shards=2, workers=2, log="journal", epochs=50)
        changed = path.read_text().replace("{log: journal}", "{log: journal, backups: 1}")
        path.write_text(changed.replace("{epochs: 50}", f"{{epochs: 50, steps: {steps}}}"))
        return load_job(path).json_text()

    def is_in_step(cluster: LocalCluster) -> bool:
        job = _status(cluster)
        return job["state"] == "training" and all(part["is_synced"] for part in job["parts"].values())

    runs = tmp_path / "runs"
    first = local_cluster(shards=2, workers=2, runs=runs)
    job = _submit(first, text(steps=10**6))
    poll("the backups to be in step", lambda: is_in_step(first), 90)
    first.kill("shard-1")
    poll("the backup to take over", lambda: _status(first)["faults"]["failovers"] == 1, 30)
    poll("training to go on", _has_trained(first, _status(first)["steps"] + 30), 60)
    _checkpoint(first, job, poll)  # one process serves both parts now
    _kill_all(first)

    second = local_cluster(shards=2, workers=2, runs=runs)
    manifest = json.loads((runs / job / "checkpoints" / "1" / "checkpoint.json").read_text())["manifest"]
    before = int(manifest["sums"]["train"]["steps"])
    resumed = _submit(second, text(steps=before + 1500), f"{job}/1")
    poll("the backups to be in step", lambda: is_in_step(second), 90)
    second.kill("shard-0")
    poll("the backup to take over", lambda: _status(second)["faults"]["failovers"] == 1, 30)
    result = _end(second, resumed, poll)
    assert result["resumed_from"] == f"{job}/1"
    assert result["examples_repeated"] == 0
    assert before + 1500 <= result["steps"] < before + 3000
    assert result["valid"]["bits"] < 5.0


@pytest.mark.parametrize(
    "consistency",
    [
        pytest.param("{mode: sync}", marks=pytest.mark.slow),
        "{mode: sync, quorum: 2}",
        pytest.param("{mode: bounded, slack: 1}", marks=pytest.mark.slow),
    ],
)
def test_workers_that_wait_for_each_other_stop_all_the_same(
    consistency: str, tmp_path: Path, local_cluster: Make, tiny_job: Job, poll: Poll
) -> None:
    cluster = local_cluster(shards=2, workers=3)
    path = tiny_job("waiting", shards=2, workers=3, epochs=20)
    path.write_text(path.read_text() + f"consistency: {consistency}\n")
    job = _submit(cluster, load_job(path).json_text())
    poll("the workers to train", _has_trained(cluster, 60), 90)
    for number in (1, 2, 3):
        figures = _checkpoint(cluster, job, poll)
        assert figures["taken"][-1] == number
        assert figures["pause_seconds"] < 5
        steps = _status(cluster)["steps"]
        poll("training to go on", _has_trained(cluster, steps + 30), 30)
    assert _status(cluster)["checkpoint"]["given_up"] == 0


def test_an_embedded_run_that_was_killed_goes_on_from_its_last_checkpoint(
    paramserver: Callable[..., Any], tiny_job: Job, poll: Poll
) -> None:
    path = tiny_job("embedded")
    path.write_text(path.read_text() + "checkpoint: {every_steps: 100, keep: 1}\n")
    runs: Path = paramserver.directory / "runs"
    with paramserver.start("run", path) as process:
        drain = threading.Thread(target=process.stderr.read)
        drain.start()
        poll("the first checkpoint", (runs / "embedded" / "checkpoints" / "1" / "checkpoint.json").exists, 120)
        process.kill()
        process.wait()
        drain.join()
    assert not (runs / "embedded" / "result.json").exists(), "the kill came too late to prove anything"
    (number,) = [entry.name for entry in (runs / "embedded" / "checkpoints").iterdir() if entry.name.isdecimal()]

    other = tiny_job("changed", hidden=8)
    other.write_text(other.read_text().replace("name: changed", "name: embedded"))
    refused = paramserver("run", other, "--resume")
    assert refused.code == 1
    assert "model.args.hidden: found 8, the checkpoint's is 16" in refused.err

    result = paramserver("run", path, "--resume", "--json", seconds=200).json()
    assert result["state"] == "done"
    assert result["resumed_from"] == f"embedded/{number}"
    assert result["checkpoints"][-1] > int(number)
    assert result["examples_repeated"] == 0
    assert result["residuals_lost"] == 0
    assert result["valid"]["bits"] < 5.0


def test_a_cluster_that_stays_takes_a_checkpoint_by_command_and_goes_on_from_it(
    paramserver: Callable[..., Any], tiny_job: Job, poll: Poll
) -> None:
    assert paramserver("up", "--shards", "1", "--workers", "1").code == 0
    job = paramserver("submit", tiny_job("stays", epochs=50)).out.strip()

    def state() -> Any:
        return paramserver("status", job, "--json").json()

    poll("the worker to train", lambda: state()["state"] == "training" and state()["steps"] > 50, 90, 0.2)
    taken = paramserver("checkpoint", job, "--json").json()
    assert taken["checkpoint"] == 1
    assert taken["pause_seconds"] < 10
    paramserver("cancel", job)
    again = paramserver("checkpoint", job)
    assert again.code == 2
    assert "taken while a job is training" in again.err
    resumed = paramserver("submit", tiny_job("stays"), "--from", f"{job}/1").out.strip()
    assert resumed == "stays-2"
    poll("the job to end", lambda: state_of(paramserver, resumed) == "done", 120, 0.3)
    shown = paramserver("status", resumed)
    assert f"this run goes on from {job}/1" in shown.out


def state_of(paramserver: Callable[..., Any], job: str) -> Any:
    return next(entry["state"] for entry in paramserver("jobs", "--json").json() if entry["id"] == job)


def test_of_a_job_that_does_not_train_there_is_no_checkpoint(local_cluster: Make, tiny_job: Job) -> None:
    cluster = local_cluster(shards=1, workers=1)
    job = _submit(cluster, load_job(tiny_job("waiting", workers=2)).json_text())
    with Api(cluster.url) as api, pytest.raises(ApiError, match="taken while a job is training"):
        api.checkpoint(job)
    with Api(cluster.url) as api, pytest.raises(ApiError, match="there is no checkpoint of 'waiting'"):
        api.submit(load_job(tiny_job("waiting")).json_text(), "")
