"""Shard processes that are killed or stopped while their backups live: the job goes on, and loses nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.api import Api
from deploy.local import LocalCluster
from paramserver.job import load_job

Make = Callable[..., LocalCluster]
Job = Callable[..., Path]
Poll = Callable[..., Any]

pytestmark = pytest.mark.timeout(900)
STEPS = 100
START_SECONDS = 180.0  # a loaded machine starts five processes and compiles kernels
SERVE_AGAIN_SECONDS = 2.0  # of the session's end


def _status(cluster: LocalCluster) -> dict[str, Any]:
    with Api(cluster.url) as api:
        return dict(api.status()["job"] or {"state": "none", "steps": 0, "parts": {}})


def _submit(cluster: LocalCluster, path: Path) -> str:
    text = path.read_text(encoding="utf-8").replace("log: journal", "log: journal, backups: 1")
    path.write_text(text, encoding="utf-8")
    with Api(cluster.url) as api:
        return str(api.submit(load_job(path).json_text())["id"])


def _is_over(cluster: LocalCluster, job: str) -> bool:
    with Api(cluster.url) as api:
        return api.job(job)["state"] in ("done", "failed", "cancelled")


def _end(cluster: LocalCluster, job: str, poll: Poll) -> dict[str, Any]:
    """The result of a job that is done."""
    poll("the job to end", lambda: _is_over(cluster, job), 600, 0.3)
    result = dict(json.loads((cluster.topology.runs / job / "result.json").read_text()))
    assert result["state"] == "done", (result["reason"], result["events"])
    assert cluster.deaths() == [], "somebody died who was not killed"
    return result


def _trains_in_step(cluster: LocalCluster, steps: int) -> Callable[[], bool]:
    """Whether so many steps are done, and every part has a backup in step."""

    def look() -> bool:
        job = _status(cluster)
        synced = [part["is_synced"] for part in job["parts"].values()]
        return job["state"] == "training" and job["steps"] >= steps and all(synced) and len(synced) > 0

    return look


def _is_exact(result: dict[str, Any], figures: dict[str, Any]) -> None:
    """Every step of a worker is one update of each block, once; residuals follow at the end."""
    for name, worker in figures["workers"].items():
        updates = result["staleness"]["by_worker"][name]["updates"]
        assert 0 <= updates - worker["steps"] * figures["blocks"] <= figures["blocks"], name


def test_a_killed_shards_blocks_are_served_by_its_backup_and_no_update_is_lost_or_applied_twice(
    local_cluster: Make, tiny_job: Job, poll: Poll
) -> None:
    cluster = local_cluster(shards=3, workers=2)
    job = _submit(cluster, tiny_job("failover", shards=3, workers=2, log="journal", epochs=2))
    poll("the workers to train and the backups to be in step", _trains_in_step(cluster, STEPS), START_SECONDS)
    cluster.kill("shard-1")
    assert _status(cluster)["state"] == "training", "the kill came too late to prove anything"
    poll("the backup to serve", lambda: _status(cluster)["failover_seconds"], 30)
    figures = _status(cluster)
    assert figures["parts"]["shard-1"]["shard"] == "shard-2"
    assert figures["parts"]["shard-1"]["term"] == 2
    assert figures["failover_seconds"][0] < SERVE_AGAIN_SECONDS
    steps = figures["steps"]
    poll("the workers to go on", lambda: _status(cluster)["steps"] > steps + 20, 30)
    result = _end(cluster, job, poll)
    assert result["faults"]["failovers"] == 1
    assert result["workers_lost"] == []
    assert result["examples_repeated"] == 0
    assert result["valid"]["bits"] < 5.0
    _is_exact(result, _status(cluster))


@pytest.mark.slow
def test_a_shard_that_is_started_again_is_backup_and_then_serves_its_blocks_again(
    local_cluster: Make, tiny_job: Job, poll: Poll
) -> None:
    cluster = local_cluster(shards=3, workers=2)
    job = _submit(cluster, tiny_job("returned", shards=3, workers=2, log="journal", epochs=6))
    poll("the workers to train and the backups to be in step", _trains_in_step(cluster, STEPS), START_SECONDS)
    cluster.kill("shard-1")
    poll("the backup to serve", lambda: _status(cluster)["failover_seconds"], 30)
    cluster.start_shard("shard-1")
    poll("all to be in step again", _trains_in_step(cluster, 0), 60)
    poll("the load to be even", lambda: _status(cluster)["parts"]["shard-1"]["shard"] == "shard-1", 60)
    poll("all to be in step once more", _trains_in_step(cluster, 0), 60)
    assert _status(cluster)["state"] == "training", "it came too late to prove anything"
    result = _end(cluster, job, poll)
    assert result["faults"]["failovers"] == 1
    assert result["examples_repeated"] == 0
    _is_exact(result, _status(cluster))


@pytest.mark.slow
def test_a_stopped_shard_that_wakes_up_acknowledges_nothing_under_its_old_term(
    local_cluster: Make, tiny_job: Job, poll: Poll
) -> None:
    cluster = local_cluster(shards=3, workers=2)
    job = _submit(cluster, tiny_job("stopped", shards=3, workers=2, log="journal", epochs=6))
    poll("the workers to train and the backups to be in step", _trains_in_step(cluster, STEPS), START_SECONDS)
    sleeper = cluster.pids()["shard-1"]
    os.kill(sleeper, signal.SIGSTOP)
    try:
        poll("the backup to serve", lambda: _status(cluster)["failover_seconds"], 30)
    finally:
        os.kill(sleeper, signal.SIGCONT)
    poll("all to be in step again", _trains_in_step(cluster, 0), 60)
    result = _end(cluster, job, poll)
    assert cluster.pids().get("shard-1") == sleeper, "it lives on"
    assert result["faults"]["failovers"] == 1
    assert result["examples_repeated"] == 0
    _is_exact(result, _status(cluster))


@pytest.mark.slow
def test_both_holders_of_a_part_and_the_coordinator_die_and_the_job_goes_on(
    local_cluster: Make, tiny_job: Job, poll: Poll
) -> None:
    cluster = local_cluster(shards=2, workers=2)
    job = _submit(cluster, tiny_job("all", shards=2, workers=2, log="journal", epochs=4))
    poll("the workers to train and the backups to be in step", _trains_in_step(cluster, STEPS), START_SECONDS)
    for name in ("coordinator", "shard-0", "shard-1"):
        cluster.kill(name)
    cluster.start_coordinator()
    for name in ("shard-0", "shard-1"):
        cluster.start_shard(name)
    poll("both to be in step again", _trains_in_step(cluster, STEPS), 60)
    result = _end(cluster, job, poll)
    assert result["valid"]["bits"] < 5.0
    assert result["examples_repeated"] == 0
