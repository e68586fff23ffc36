"""How people are told who serves what, and what happened."""

from __future__ import annotations

from pathlib import Path

from paramserver.cli.figures import event_rows, result_rows, status_rows
from paramserver.coordinator.core import CoordinatorCore
from paramserver.coordinator.effects import JobRecord
from paramserver.coordinator.lifecycle import JobRun
from paramserver.coordinator.placement import Holder, place
from paramserver.coordinator.report import job_figures, job_result
from paramserver.job import parse_job_text
from paramserver.protocol.layout import Parameter, cut_layout
from paramserver.protocol.messages import PartReport

JOB = """
name: j
model: {family: recurrent, args: {task: char-lm}}
durability: {log: journal, backups: 1}
"""
LAYOUT = cut_layout([Parameter("a", (30,), "g"), Parameter("b", (20,), "g")])


def make_run() -> JobRun:
    """A job that trains, with part `a` served without a backup and part `b` with one that is behind."""
    record = JobRecord("j", 1, parse_job_text(JOB).json_text(), (), "today", "training")
    run = JobRun(record, 0.0, [], lambda name: None)
    shards = {name: Holder(name, 1, f"tcp://{name}") for name in ("a", "b")}
    run.layout = LAYOUT
    run.failover.begin(place(LAYOUT, shards, 2, has_backups=True), LAYOUT)
    run.telemetry.take_part("b", 1, PartReport("b", "j", term=1, record=70, stored=50))
    run.failover._change(run.failover.parts[0], 1.0, backup=None, term=2, failovers=1)
    run.failover.seconds.append(0.4)
    run.note("a died (it was not heard of for 3.1 s); b takes over part a under term 2", 2.5)
    return run


def test_status_says_who_serves_each_part_and_how_far_its_backup_is() -> None:
    figures = job_figures(make_run(), "", 3.0)
    rows = dict(status_rows(figures))
    assert rows["part a"] == "served by a under term 2, 1 failover(s)"
    assert rows["part b"] == "served by b under term 1, backup a catching up, 20 records behind"
    assert "failovers 1" in rows["survived"]
    assert event_rows(figures) == [
        ("2.5 s", "a died (it was not heard of for 3.1 s); b takes over part a under term 2")
    ]


def test_the_end_of_a_job_tells_its_failovers() -> None:
    rows = dict(result_rows(job_result(make_run(), {}, 3.0)))
    assert rows["failovers"] == "1, the slowest 0.4 s after the session's end"


def test_a_job_that_never_ran_has_no_part_to_show(tmp_path: Path) -> None:
    core = CoordinatorCore(0.0)
    core.submit("j", parse_job_text(JOB).json_text(), [], "today", 0.0)
    core.cancel("j", 1.0)
    assert "failovers" not in dict(result_rows(core.results["j"]))
