"""Throughput, recovery and verdict: what the report says follows from what was seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.chaos.faults import Evidence
from deploy.chaos.harness import Outcome, Run
from deploy.chaos.proof import Noted, Proof
from deploy.chaos.report import lines, make_report
from deploy.chaos.schedule import Declaration, Planned, make_schedule
from deploy.chaos.watch import Recovery, Sample, Status, Throughput, throughput
from deploy.local import Death

DECLARATION = Declaration(seed=3, seconds=60.0, shards=2, workers=2, faults=12, stalls=3)
RESULT: dict[str, Any] = {
    "state": "done",
    "reason": "",
    "workers_lost": ["worker-0"],
    "shards_recovered": [],
    "examples_repeated": 8,
    "examples": 1000.0,
    "steps": 500,
    "valid": {"loss": 2.0},
}
NOTED = Noted({}, 0, {("worker-0", 1): 300, ("worker-1", 1): 210})


def _run(**changes: Any) -> Run:
    outcomes = [
        Outcome(planned, planned.at_seconds, Evidence(True, "seen"), 2.5, 0.25)
        for planned in make_schedule(DECLARATION)
    ]
    deaths = [
        Death(outcome.planned.target, -9 if outcome.planned.kind.startswith("kill-") else 0, Path("log"))
        for outcome in outcomes
        if outcome.planned.kind.startswith(("kill-", "restart-"))
    ]
    run = Run("job", RESULT, Throughput(60.0, 5400, 40.0, 3900), Proof(100, 101, 0, 0), NOTED, outcomes, deaths)
    return replace(run, **changes)


QUIET = Run("job", RESULT | {"valid": {"loss": 1.99}}, Throughput(60.0, 6000), Proof(6000, 6000, 0, 0), NOTED)


def test_a_clean_run_has_no_failures_and_says_its_figures() -> None:
    report = make_report(DECLARATION, _run(), QUIET, "")
    assert report["failures"] == []
    assert report["fired"] == 12
    assert report["throughput"]["kept_in_all"] == pytest.approx(0.9)
    assert report["throughput"]["kept_outside_recovery"] == pytest.approx(0.975)
    assert report["restart_cpu_seconds"] == 3.0
    assert report["loss"]["change"] == pytest.approx(2.0 / 1.99 - 1)
    assert report["examples"] == {"repeated": 8, "counted": 1000.0, "steps_counted": 500, "steps_in_accounts": 510}
    text = "\n".join(lines(report))
    assert "0 lost, 0 doubled" in text
    assert "90.0% of the quiet run, at least 85%" in text
    assert "within 2%" in text
    assert "no update was lost" in text


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"proof": Proof(100, 99, 1, 0, ("worker-0 update 5",))}, "1 updates lost: worker-0 update 5"),
        ({"proof": Proof(100, 101, 0, 2, ())}, "2 updates doubled"),
        ({"result": RESULT | {"state": "failed", "reason": "no disk"}}, "the job is failed: no disk"),
        ({"deaths": [Death("shard-9", 1, Path("its log"))]}, "nobody asked for this death: shard-9"),
    ],
)
def test_what_may_not_be_is_a_failure(change: dict[str, Any], word: str) -> None:
    report = make_report(DECLARATION, _run(**change), QUIET, "")
    assert any(word in failure for failure in report["failures"]), report["failures"]
    text = "\n".join(lines(report))
    assert "FAILED: " in text
    assert "no update was lost" not in text


def test_a_fault_that_is_not_proven_or_not_recovered_from_is_a_failure() -> None:
    first, second, *others = _run().outcomes
    unproven = replace(first, evidence=Evidence(False, "nothing seen"))
    unrecovered = replace(second, recovery_seconds=None)
    failures = make_report(DECLARATION, _run(outcomes=[unproven, unrecovered, *others]), QUIET, "")["failures"]
    assert any("fault 0" in failure and "not proven: nothing seen" in failure for failure in failures)
    assert any("fault 1" in failure and "not recovered" in failure for failure in failures)


def test_slowness_and_loss_are_told_and_are_no_failure() -> None:
    slow = _run(throughput=Throughput(60.0, 600, 40.0, 400), result=RESULT | {"valid": {"loss": 2.5}})
    report = make_report(DECLARATION, slow, QUIET, "")
    assert report["failures"] == []
    text = "\n".join(lines(report))
    assert "LESS THAN 85%" in text
    assert "LESS THAN 95%" in text
    assert "NOT WITHIN 2%" in text


def test_without_a_quiet_run_nothing_is_compared() -> None:
    report = make_report(DECLARATION, _run(), None, "there was no quiet run")
    assert report["throughput"]["kept_in_all"] is None
    assert report["loss"]["change"] is None
    assert "not compared: there was no quiet run" in "\n".join(lines(report))


def _samples(*counts: tuple[float, int, bool]) -> list[Sample]:
    return [Sample(*count) for count in counts]


def test_throughput_is_of_the_training_and_apart_outside_the_windows() -> None:
    samples = _samples(
        (0, 0, False), (1, 10, True), (2, 20, True), (3, 22, True), (4, 24, True), (5, 34, True), (6, 40, False)
    )
    found = throughput(samples, [(2.5, 3.5), (2.0, 3.0)])
    assert found == Throughput(4.0, 24, 2.0, 20.0)
    assert (found.a_second, found.outside_a_second) == (6.0, 10.0)
    assert throughput(samples, []).outside_updates == 24
    assert throughput(samples[:2], []) == Throughput(0.0, 0)
    assert throughput(samples, [(0.0, 9.0)]).outside_a_second == 0.0


PIDS = {"coordinator": 1, "shard-0": 2, "worker-0": 3}
PLANNED = Planned(0, 1.0, "stop-worker", "worker-0", seconds=1.0)


def _status(at: float, mark: float, pids: dict[str, int], heard: float = 0.1, **job: Any) -> Status:
    sessions = [{"name": name, "pid": pid, "seconds_since_heartbeat": heard} for name, pid in pids.items()]
    body = {"sessions": sessions, "uptime_seconds": mark, "job": {"state": "training", "waiting": "", **job}}
    return Status(at, body)


@pytest.mark.parametrize(
    ("status", "acknowledged", "is_over"),
    [
        (_status(12.0, 7.0, {"shard-0": 2, "worker-0": 3}), 106, True),
        (_status(12.0, 7.0, {"shard-0": 2, "worker-0": 3}), 105, False),  # not two steps of three blocks
        (_status(12.0, 7.0, {"shard-0": 2}), 106, False),  # one is missing
        (_status(12.0, 7.0, {"shard-0": 2, "worker-0": 9}), 106, False),  # the dead one's session is still there
        (_status(12.0, 7.0, {"shard-0": 2, "worker-0": 3}, heard=2.5), 106, False),
        (_status(12.0, 7.0, {"shard-0": 2, "worker-0": 3}, waiting="for shard-0"), 106, False),
        (_status(10.5, 7.0, {"shard-0": 2, "worker-0": 3}), 106, False),  # an answer from before its end
        (_status(12.0, 5.0, {"shard-0": 2, "worker-0": 3}), 106, False),  # the snapshot is from before
        (_status(12.0, 7.0, {}, state="draining"), 100, True),  # the job has ended: nothing is left to recover
        (None, 106, False),
    ],
)
def test_a_cluster_has_recovered_when_all_are_heard_and_every_worker_has_gone_on(
    status: Status | None, acknowledged: int, is_over: bool
) -> None:
    recovery = Recovery(PLANNED, fired_at=10.0, ended_at=11.0, counts={"worker-0": 100}, age_mark=5.0)
    assert recovery.look(13.0, status, {"worker-0": acknowledged}, 3, PIDS) is is_over
    assert recovery.recovered_at == (13.0 if is_over else None)
