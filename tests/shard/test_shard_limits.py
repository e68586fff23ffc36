"""What peers can make a shard hold: parked pulls, names of workers, rows of its report."""

from __future__ import annotations

import pytest
from test_shard_core import LAYOUT, Driver

from paramserver.protocol.messages import Held, Pull, Refusal, Want, Welcome
from paramserver.shard import core as core_module
from paramserver.shard import telemetry as telemetry_module
from paramserver.shard.telemetry import OTHERS, Telemetry


def refusal(reply: object) -> str:
    assert isinstance(reply, Refusal), reply
    return reply.code


def parking() -> Driver:
    """A shard where w0 is too far ahead to pull."""
    driver = Driver(members=("w0", "w1"), consistency={"mode": "bounded", "slack": 0})
    driver.push("w0", 1)
    return driver


def test_parked_pulls_of_a_worker_are_bounded_by_what_it_may_want_at_all() -> None:
    driver = parking()
    rounds = core_module.PARKED_ROUNDS * len(LAYOUT.blocks)
    for request in range(rounds):
        (held,) = driver.pull("w0", step=1, request=request)
        assert isinstance(held.message, Held)
    (refused,) = driver.pull("w0", step=1, request=rounds)
    assert refusal(refused.message) == "not-served"
    (again,) = driver.pull("w0", step=1, request=0)
    assert isinstance(again.message, Held), "one that waits may be asked for again"
    # The others are not concerned, and who waits is answered when it is its turn.
    answered = driver.push("w1", 1)
    assert sum(type(reply.message).__name__ == "Pulled" for reply in answered) == rounds


def test_push_that_waits_for_its_pull_keeps_no_updates() -> None:
    driver = parking()
    driver.push("w0", 2, request=3, wants=(Want(0),))
    assert driver.core.serving is not None
    (parked,) = driver.core.serving.parked[b"w0"].values()
    assert isinstance(parked, Pull)
    assert parked.request == 3


def test_names_of_workers_are_bounded_and_known_ones_are_always_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "MAX_WORKERS", 4)
    driver = Driver()
    for number in range(2, 4):
        assert isinstance(driver.hello(f"w{number}"), Welcome)
    assert refusal(driver.hello("w4")) == "not-served"
    assert isinstance(driver.hello("w3", incarnation=2), Welcome)


def test_staleness_rows_are_bounded_and_nothing_goes_uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_module, "MOST_ROWS", 10)
    telemetry = Telemetry()
    for number in range(1000):
        telemetry.applied(f"w{number}", "group", "int4/64", 1, 10, 20)
    rows = telemetry.staleness_rows()
    assert len(rows) == 11
    assert sum(sum(row.counts) for row in rows) == 1000
    assert OTHERS in {row.worker for row in rows}
