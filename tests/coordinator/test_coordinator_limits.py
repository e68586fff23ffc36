"""What peers can make the coordinator hold: names, reports."""

from __future__ import annotations

import pytest
from coordinator_fakes import LAYOUT

from paramserver.coordinator import sessions as sessions_module
from paramserver.coordinator import telemetry as telemetry_module
from paramserver.coordinator.core import CoordinatorCore
from paramserver.coordinator.sessions import Sessions
from paramserver.coordinator.telemetry import Telemetry
from paramserver.protocol.messages import Heartbeat, LeaseDone, Refusal, Register, Registered, WorkerReport

REPORT = WorkerReport(
    job="job",
    layout=LAYOUT,
    examples={"train": 5},
    held=(1, 2),
    returned=(3,),
    done=(LeaseDone(4),),
    begun=(1,),
    steps=7,
)


def test_names_are_bounded_and_known_ones_may_always_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "MAX_NAMES", 3)
    sessions = Sessions({"old": 4})
    for name in ("a", "b"):
        assert isinstance(sessions.register(b"p", Register(role="worker", name=name), 0.0), Registered)
    refused = sessions.register(b"p", Register(role="worker", name="c"), 0.0)
    assert isinstance(refused, Refusal)
    assert refused.code == "not-served"
    assert "stable names" in refused.detail
    assert isinstance(sessions.register(b"p", Register(role="worker", name="old"), 0.0), Registered)
    assert len(sessions.incarnations) == 3


def test_layouts_and_leases_of_a_report_are_not_kept() -> None:
    core = CoordinatorCore(0.0)
    core.handle(b"p", Register(role="worker", name="w"), [], 0.0)
    core.handle(b"p", Heartbeat(name="w", incarnation=1, seen=0, report=REPORT), [], 0.1)
    session = core.sessions.get("w")
    assert session is not None
    kept = session.report
    assert isinstance(kept, WorkerReport)
    assert (kept.layout, kept.examples, kept.returned, kept.done, kept.begun) == (None, {}, (), (), ())
    assert (kept.job, kept.steps, kept.held) == ("job", 7, (1, 2))


def test_reports_of_dead_incarnations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_module, "MOST_PROCESSES", 10)
    telemetry = Telemetry()
    for incarnation in range(100):
        telemetry.take_worker("w", incarnation, REPORT)
    assert len(telemetry.workers) == 10
    assert ("w", 99) in telemetry.workers
