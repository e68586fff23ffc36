"""What the status says of a job, from what its shards report."""

from __future__ import annotations

import pytest

from paramserver.coordinator.telemetry import Telemetry
from paramserver.protocol.messages import PartReport


@pytest.mark.parametrize(("periods", "longest"), [((), 0), ((0, 0), 0), ((1, 2), 2)])
def test_the_longest_publishing_period_in_force_is_in_the_status(periods: tuple[int, ...], longest: int) -> None:
    telemetry = Telemetry()
    for number, period in enumerate(periods):
        telemetry.parts[f"shard-{number}"] = PartReport(f"shard-{number}", "job", publish_period=period, editions=3)
    assert telemetry.traffic()["publish_period"] == longest
    assert [one["publish_period"] for one in telemetry.by_part().values()] == list(periods)
