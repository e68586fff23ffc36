"""A real job under real faults: each of them happens, none costs an acknowledged update, and the proof can fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.chaos.campaign import resolve_job
from deploy.chaos.harness import Run, Tormentor, chaos_cluster
from deploy.chaos.journals import JournalTap
from deploy.chaos.proof import prove_files
from deploy.chaos.schedule import Kind, Planned
from deploy.local import Topology
from paramserver.account import Account, account_files
from paramserver.job import Job, load_job, parse_job
from paramserver.process import StopRequest
from paramserver.shard.journal.layout import SegmentReader
from paramserver.shard.journal.records import Pushed

Commands = Callable[..., Any]
MakeJob = Callable[..., Path]

SECONDS: dict[Kind, float] = {
    "stop-worker": 1.0,
    "cut-worker-shard": 1.5,
    "full-disk": 1.0,
    "kill-shard": 0.0,
    "kill-worker": 0.0,
    "stop-shard": 1.0,
    "cut-worker-coordinator": 1.5,
    "kill-coordinator": 0.0,
    "cut-shard-coordinator": 1.5,
    "stop-coordinator": 1.0,
    "restart-coordinator": 0.0,
}


def _with_steps(job: Job, steps: float) -> Job:
    return parse_job({**job.model_dump(mode="json"), "stop": {"epochs": 10**6, "steps": round(steps)}}, "job")


def _run(tmp_path: Path, path: Path, schedule: tuple[Planned, ...], seconds: float) -> Run:
    """A run whose steps take about so long on this machine as it is now: twice the schedule, for that may change."""
    job, changed = resolve_job(load_job(path).model_dump(mode="json"), shards=2, workers=2)
    assert len(changed) == 1, "a job without a journal gets one, and is told so"
    topology = Topology(shards=2, workers=2, runs=tmp_path / "runs")
    stop, told = StopRequest(), []
    with chaos_cluster(tmp_path / "cluster", topology, stop) as cluster:
        tormentor = Tormentor(cluster, stop, told.append)
        rate = tormentor.steps_a_second(_with_steps(job, 10**9), 2.0)
        return tormentor.run(_with_steps(job, rate * seconds), schedule, seconds)


def _planned(kinds: list[Kind], distance: float, is_silent: bool = False) -> tuple[Planned, ...]:
    found = []
    for number, kind in enumerate(kinds):
        verb, *roles = kind.split("-")
        ends = ["coordinator" if role == "coordinator" else f"{role}-1" for role in roles]
        if kind == "full-disk":
            ends = ["shard-1"]
        other = ends[1] if verb == "cut" else ""
        found.append(Planned(number, distance * (number + 1), kind, ends[0], other, SECONDS[kind], is_silent))
    return tuple(found)


@pytest.mark.timeout(400)
def test_updates_survive_faults_of_every_sort_and_the_proof_sees_what_is_tampered_with(
    tmp_path: Path, tiny_job: MakeJob, processes: Callable[[], list[Any]]
) -> None:
    schedule = _planned(["stop-worker", "cut-worker-shard", "full-disk", "kill-shard"], 2.5)
    run = _run(tmp_path, tiny_job("torn"), schedule, 22.0)
    assert processes() == []
    assert run.result["state"] == "done"
    for outcome in run.outcomes:
        assert outcome.evidence.has_fired, outcome
        assert outcome.recovery_seconds is not None, outcome
    assert "File too large" in run.outcomes[2].evidence.text
    assert run.proof.is_clean, run.proof
    assert 0 < run.proof.acknowledged <= run.proof.applied
    assert run.throughput.a_second > 0
    assert [death.name for death in run.deaths] == ["shard-1"]

    # The same from what is on the disk, and then with one update more acknowledged, and with one less applied.
    cluster = tmp_path / "cluster"
    again, _ = prove_files(cluster / "accounts", run.job, _tap(cluster, run.job))
    assert again == run.proof
    (worker, incarnation), path = min(account_files(cluster / "accounts", run.job).items())
    shutil.copytree(cluster / "accounts", tmp_path / "tampered")
    last = run.noted.last
    stream = next(stream for stream in last if (stream.worker, stream.incarnation) == (worker, incarnation))
    account = Account(tmp_path / "tampered", run.job, worker, incarnation)
    account.note(stream.block, 9999, last[stream] + 1)
    account.close()
    tampered, _ = prove_files(tmp_path / "tampered", run.job, _tap(cluster, run.job))
    assert (tampered.lost, tampered.doubled) == (1, 0)
    assert path.name.startswith(worker)

    segment = sorted((cluster / "state" / "shards" / "shard-0").rglob("segment-*.log"))[-1]
    updates = _cut_last_push(segment)
    cut, _ = prove_files(cluster / "accounts", run.job, _tap(cluster, run.job))
    assert (cut.lost, cut.doubled) == (updates, 0)
    segment.unlink()
    gone, _ = prove_files(cluster / "accounts", run.job, _tap(cluster, run.job))
    assert gone.lost > updates, "without its journal every update of a shard is lost"


def _tap(cluster: Path, job: str) -> JournalTap:
    kept = cluster / "again"
    shutil.rmtree(kept, ignore_errors=True)
    return JournalTap(cluster / "state" / "shards", job, kept)


def _cut_last_push(segment: Path) -> int:
    """Cut a segment off before its last push. Returns how many updates that held."""
    data = segment.read_bytes()
    reader = SegmentReader(segment.name, data, int(segment.stem.removeprefix("segment-")))
    begin, updates = 0, 0
    for entry in reader:
        if isinstance(entry.record, Pushed):
            begin, updates = reader.end, len(entry.record.updates)  # its end is where this record begins
    segment.write_bytes(data[:begin])
    return updates


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_silent", [False, True])
def test_every_kind_of_fault_happens_and_costs_no_update(tmp_path: Path, tiny_job: MakeJob, is_silent: bool) -> None:
    schedule = _planned(list(SECONDS), 7.0, is_silent)
    run = _run(tmp_path, tiny_job("torn"), schedule, 160.0)
    assert {outcome.planned.kind for outcome in run.outcomes} == set(SECONDS)
    for outcome in run.outcomes:
        assert outcome.evidence.has_fired, outcome
        assert outcome.recovery_seconds is not None, outcome
    assert run.proof.is_clean, run.proof
    assert run.result["state"] == "done"
    assert sorted(death.name for death in run.deaths) == ["coordinator", "coordinator", "shard-1", "worker-1"]
    assert run.restart_cpu_seconds > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_minute_of_chaos_is_reported_and_clean(paramserver: Commands, tiny_job: MakeJob) -> None:
    options = ["--seed", 5, "--minutes", 1, "--shards", 2, "--workers", 2, "--faults", 8, "--quiet-minutes", 0.2]
    job = tiny_job("minute", hidden=64, chars=400_000)
    done = paramserver("chaos", *options, "--job", job, "--json", "--out", "report.json", seconds=550)
    report = done.json()
    assert json.loads((paramserver.directory / "report.json").read_text()) == report
    assert report["failures"] == []
    assert report["fired"] == 8
    assert report["declared"] == {"faults": 8, "stalls": 1, "mix": report["declared"]["mix"]}
    assert (report["updates"]["lost"], report["updates"]["doubled"]) == (0, 0)
    assert report["updates"]["acknowledged"] > 1000
    assert report["throughput"]["kept_in_all"] > 0
    assert report["loss"]["change"] is None
    assert report["loss"]["why_not_compared"]
    assert not list(paramserver.directory.glob("paramserver-chaos-*")), "a clean run leaves nothing"
