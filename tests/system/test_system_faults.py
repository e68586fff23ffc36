"""Processes killed in the middle of a job: what must survive does, and the result says what happened."""

from __future__ import annotations

import json
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

pytestmark = pytest.mark.timeout(240)
KILL_STEPS = 150


def _submit(cluster: LocalCluster, path: Path) -> str:
    with Api(cluster.url) as api:
        return str(api.submit(load_job(path).json_text())["id"])


def _job(cluster: LocalCluster) -> dict[str, Any]:
    with Api(cluster.url) as api:
        return dict(api.status()["job"] or {"state": "none", "steps": 0, "workers": {}})


def _is_over(cluster: LocalCluster, job: str) -> bool:
    with Api(cluster.url) as api:
        return api.job(job)["state"] in ("done", "failed", "cancelled")


def _result(cluster: LocalCluster, job: str) -> dict[str, Any]:
    return dict(json.loads((cluster.topology.runs / job / "result.json").read_text()))


def _is_training(cluster: LocalCluster, workers: int) -> Callable[[], bool]:
    """Whether every worker has made enough steps that a kill falls in the middle."""

    def look() -> bool:
        job = _job(cluster)
        steps = [worker["steps"] for worker in job["workers"].values()]
        return job["state"] == "training" and len(steps) == workers and min(steps) >= KILL_STEPS

    return look


def test_a_killed_worker_costs_only_its_unreported_examples(local_cluster: Make, tiny_job: Job, poll: Poll) -> None:
    cluster = local_cluster(shards=2, workers=2)
    path = tiny_job("killed-worker", shards=2, workers=2)
    job = _submit(cluster, path)
    poll("both workers to train", _is_training(cluster, 2), 60)
    cluster.kill("worker-1")
    assert _job(cluster)["state"] == "training", "the kill came too late to prove anything"
    poll("the job to end", lambda: _is_over(cluster, job), 120, 0.3)
    result = _result(cluster, job)
    assert result["state"] == "done"
    assert len(result["workers_lost"]) == 1
    assert "worker-1" in str(result["workers_lost"])
    # It may have begun two leases: the one that it was in, and one whose last update was on its way.
    assert 0 < result["examples_repeated"] <= 2 * load_job(path).data["batch"]
    assert result["valid"]["bits"] < 5.0
    assert cluster.deaths() == []


def test_a_coordinator_that_is_killed_and_restarted_goes_on_with_the_job(
    local_cluster: Make, tiny_job: Job, poll: Poll
) -> None:
    cluster = local_cluster(shards=2, workers=2)
    job = _submit(cluster, tiny_job("killed-coordinator", shards=2, workers=2))
    poll("both workers to train", _is_training(cluster, 2), 60)
    before = _job(cluster)["steps"]
    cluster.kill("coordinator")
    cluster.start_coordinator()
    assert _job(cluster)["state"] == "training", "the kill came too late to prove anything"
    poll("the steps to go on", lambda: _job(cluster)["steps"] > before, 60, 0.2)
    poll("the job to end", lambda: _is_over(cluster, job), 120, 0.3)
    result = _result(cluster, job)
    assert result["state"] == "done"
    assert result["workers_lost"] == []
    assert result["valid"]["bits"] < 5.0
    assert cluster.deaths() == [], "shards and workers must outlive the coordinator"


def test_a_killed_shard_fails_the_job_with_a_clear_reason(local_cluster: Make, tiny_job: Job, poll: Poll) -> None:
    cluster = local_cluster(shards=2, workers=1)
    job = _submit(cluster, tiny_job("killed-shard", shards=2, epochs=100))
    poll("the worker to train", _is_training(cluster, 1), 60)
    cluster.kill("shard-1")
    poll("the job to end", lambda: _is_over(cluster, job), 60, 0.3)
    result = _result(cluster, job)
    assert result["state"] == "failed"
    assert "shard-1" in result["reason"]
    with Api(cluster.url) as api:
        assert {session["name"] for session in api.status()["sessions"]} == {"shard-0", "worker-0"}
