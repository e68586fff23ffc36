"""What the status says of a job, from what its shards report."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.coordinator.telemetry import Telemetry
from paramserver.protocol.messages import PartReport, TrafficRow, WorkerReport


@pytest.mark.parametrize(("periods", "longest"), [((), 0), ((0, 0), 0), ((1, 2), 2)])
def test_the_longest_publishing_period_in_force_is_in_the_status(periods: tuple[int, ...], longest: int) -> None:
    telemetry = Telemetry()
    for number, period in enumerate(periods):
        telemetry.parts[f"shard-{number}"] = PartReport(f"shard-{number}", "job", publish_period=period, editions=3)
    assert telemetry.traffic()["publish_period"] == longest
    assert [one["publish_period"] for one in telemetry.by_part().values()] == list(periods)


def part(**counts: object) -> PartReport:
    return PartReport("p", "job", **counts)  # type: ignore[arg-type]


def test_counts_of_messages_are_those_of_all_processes_that_served_a_part() -> None:
    telemetry = Telemetry()
    telemetry.take_part("shard-0", 1, part(bytes_in=1000, bytes_out=400, refusals={"wrong-term": 2}, updates=50))
    telemetry.take_part("shard-1", 1, part(bytes_in=10, bytes_out=0, refusals={"malformed": 1}, updates=50))
    telemetry.take_part("shard-1", 1, part(bytes_in=70, bytes_out=7, refusals={"malformed": 1}, updates=60))
    assert telemetry.totals()["pushed_bytes"] == 1070
    assert telemetry.totals()["pulled_bytes"] == 407
    assert telemetry.refusals() == {"malformed": 1, "wrong-term": 2}
    assert telemetry.totals()["updates"] == 60, "the state's own counters go on from the journal"


def test_counts_that_go_on_from_a_snapshot_never_fall_back() -> None:
    telemetry = Telemetry()
    row = TrafficRow("pull", "g", "ternary/64", payload_bytes=900, elements=1000, snapshots=3, snapshot_bytes=30)
    telemetry.take_part("shard-0", 1, part(pulls=700, traffic=(row,)))
    earlier = TrafficRow("pull", "g", "ternary/64", payload_bytes=800, elements=900, snapshots=2, snapshot_bytes=20)
    telemetry.take_part("shard-0", 2, part(pulls=650, traffic=(earlier,)))
    assert telemetry.parts["p"].pulls == 700
    assert telemetry.parts["p"].traffic == (row,)
    telemetry.take_part("shard-0", 2, part(pulls=660, traffic=(row,)))
    assert telemetry.parts["p"].pulls == 710
    assert telemetry.traffic()["snapshots"] == 4


def test_a_process_that_serves_a_part_again_is_counted_once() -> None:
    telemetry = Telemetry()
    telemetry.take_part("shard-0", 1, part(bytes_in=100))
    telemetry.take_part("shard-1", 1, part(bytes_in=30))
    telemetry.take_part("shard-0", 1, part(bytes_in=150))
    assert telemetry.totals()["pushed_bytes"] == 180
    telemetry.take_part("shard-0", 1, part(bytes_in=5))
    assert telemetry.totals()["pushed_bytes"] == 185, "it took the part up anew"


def test_counts_survive_a_restart_of_the_coordinator() -> None:
    telemetry = Telemetry()
    telemetry.take_part("shard-0", 1, part(bytes_in=100, pulls=5))
    telemetry.take_part("shard-1", 1, part(bytes_in=30, pulls=2))
    successor = Telemetry()
    successor.restore(telemetry.progress())
    successor.take_part("shard-1", 1, part(bytes_in=40, pulls=3))
    assert successor.totals()["pushed_bytes"] == 140
    assert successor.parts["p"].pulls == 6


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 3), st.integers(0, 50), st.booleans()), max_size=30)
)
def test_no_figure_of_messages_ever_falls(steps: list[tuple[str, int, int, bool]]) -> None:
    telemetry, counted = Telemetry(), dict[tuple[str, int], int]()
    before = 0.0
    for shard, incarnation, more, is_new in steps:
        key = shard, incarnation
        counted[key] = more if is_new and not counted.get(key) else counted.get(key, 0) + more
        telemetry.take_part(shard, incarnation, part(bytes_in=counted[key]))
        total = telemetry.totals()["pushed_bytes"]
        assert total >= before
        assert total == sum(counted.values())
        before = total


def test_the_loss_is_that_of_the_last_life_of_each_worker() -> None:
    telemetry = Telemetry()
    telemetry.take_worker("w", 1, WorkerReport(job="job", steps=10, loss=4.0))
    telemetry.take_worker("w", 2, WorkerReport(job="job", steps=0, loss=0.0))
    assert telemetry.loss() == 4.0, "the second has not made a step"
    telemetry.take_worker("w", 2, WorkerReport(job="job", steps=1, loss=2.0))
    assert telemetry.loss() == 2.0
    assert telemetry.steps == 11
