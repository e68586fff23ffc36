"""A shard process that is killed in the middle of a job and started again goes on with what it acknowledged."""

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

pytestmark = pytest.mark.timeout(300)
KILL_STEPS = 100


def _status(cluster: LocalCluster) -> dict[str, Any]:
    with Api(cluster.url) as api:
        return dict(api.status()["job"] or {"state": "none", "steps": 0, "workers": {}})


def _submit(cluster: LocalCluster, path: Path) -> str:
    with Api(cluster.url) as api:
        return str(api.submit(load_job(path).json_text())["id"])


def _is_over(cluster: LocalCluster, job: str) -> bool:
    with Api(cluster.url) as api:
        return api.job(job)["state"] in ("done", "failed", "cancelled")


def _result(cluster: LocalCluster, job: str) -> dict[str, Any]:
    return dict(json.loads((cluster.topology.runs / job / "result.json").read_text()))


def _has_trained(cluster: LocalCluster, steps: int) -> Callable[[], bool]:
    def look() -> bool:
        job = _status(cluster)
        return job["state"] == "training" and job["steps"] >= steps

    return look


@pytest.mark.parametrize("log", ["journal", "journal+fsync"])
def test_a_killed_shard_comes_back_and_no_update_is_lost_or_applied_twice(
    log: str, local_cluster: Make, tiny_job: Job, poll: Poll
) -> None:
    cluster = local_cluster(shards=2, workers=2)
    job = _submit(cluster, tiny_job("recovered", shards=2, workers=2, log=log))
    for kill in (1, 2):
        poll("the workers to train", _has_trained(cluster, kill * KILL_STEPS), 90)
        cluster.kill("shard-1")
        assert _status(cluster)["state"] == "training", "the kill came too late to prove anything"
        cluster.start_shard("shard-1")
        poll("the shard to be back", lambda: len(_status(cluster).get("shards_recovered", [])) == kill, 60)  # noqa: B023
    poll("the job to end", lambda: _is_over(cluster, job), 180, 0.3)
    result = _result(cluster, job)
    assert result["state"] == "done", result["reason"]
    assert result["shards_recovered"] == ["shard-1", "shard-1"]
    assert result["workers_lost"] == []
    assert result["examples_repeated"] == 0
    assert result["valid"]["bits"] < 5.0
    # Every step of a worker is one update of each block; residuals follow at the end.
    by_worker = result["staleness"]["by_worker"]
    with Api(cluster.url) as api:
        figures = api.status()["job"]
    for name, worker in figures["workers"].items():
        assert 0 <= by_worker[name]["updates"] - worker["steps"] * figures["blocks"] <= figures["blocks"]
    assert cluster.deaths() == []


def test_a_shard_that_comes_back_without_its_journal_fails_the_job_with_a_clear_reason(
    local_cluster: Make, tiny_job: Job, poll: Poll
) -> None:
    cluster = local_cluster(shards=1, workers=1)
    job = _submit(cluster, tiny_job("forgotten", log="journal", epochs=100))
    poll("the worker to train", _has_trained(cluster, KILL_STEPS), 90)
    cluster.kill("shard-0")
    (folder,) = (cluster.directory / "state" / "shards" / "shard-0").iterdir()
    folder.rename(cluster.directory / "elsewhere")
    cluster.start_shard("shard-0")
    poll("the job to end", lambda: _is_over(cluster, job), 60, 0.3)
    result = _result(cluster, job)
    assert result["state"] == "failed"
    assert "shard-0" in result["reason"]
    assert "it has lost their values" in result["reason"]


def test_a_damaged_journal_fails_the_job_and_says_where_it_is_damaged(
    local_cluster: Make, tiny_job: Job, poll: Poll
) -> None:
    cluster = local_cluster(shards=1, workers=1)
    job = _submit(cluster, tiny_job("damaged", log="journal", epochs=100))
    poll("the worker to train", _has_trained(cluster, KILL_STEPS), 90)
    cluster.kill("shard-0")
    (segment,) = (cluster.directory / "state" / "shards" / "shard-0" / job / "shard-0").glob("segment-*.log")
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 0x10
    segment.write_bytes(content)
    cluster.start_shard("shard-0")
    poll("the job to end", lambda: _is_over(cluster, job), 60, 0.3)
    result = _result(cluster, job)
    assert result["state"] == "failed"
    assert f"{segment.name}: damaged at byte" in result["reason"]
    with Api(cluster.url) as api:
        assert {session["name"] for session in api.status()["sessions"]} == {"shard-0", "worker-0"}
