"""A shard's counters. They only grow while a job is served; whoever reads them takes differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from paramserver.protocol.messages import StalenessRow, TrafficRow
from paramserver.shard.journal.states import TelemetryState
from paramserver.shard.staleness import StalenessHistogram, add_counts

MOST_ROWS = 16_384  # of staleness, so that a heartbeat stays a message; what comes later counts for OTHERS
OTHERS = "(others)"

Way = Literal["push", "pull"]


@dataclass(slots=True)
class Traffic:
    """Payload of one group one way in one encoding."""

    payload_bytes: int = 0
    elements: int = 0
    snapshots: int = 0
    snapshot_bytes: int = 0


class Telemetry:
    """Counted on the hot path, read by the report twice a second."""

    def __init__(self) -> None:
        self.pushes = 0
        self.pulls = 0
        self.updates = 0  # of blocks, duplicates not counted
        self.duplicates = 0
        self._traffic: dict[tuple[Way, str, str], Traffic] = {}
        self._staleness: dict[tuple[str, str], StalenessHistogram] = {}

    def applied(
        self, worker: str, group: str, encoding: str, staleness: int, payload_bytes: int, elements: int
    ) -> None:
        """One block update became part of the state, `staleness` versions after the edition it was computed on."""
        self.updates += 1
        traffic = self._of("push", group, encoding)
        traffic.payload_bytes += payload_bytes
        traffic.elements += elements
        histogram = self._staleness.get((worker, group))
        if histogram is None:
            if len(self._staleness) >= MOST_ROWS:
                worker = OTHERS
            histogram = self._staleness.get((worker, group))
        if histogram is None:
            histogram = self._staleness[worker, group] = StalenessHistogram()
        histogram.add(staleness)

    def pulled(self, group: str, encoding: str, payload_bytes: int, elements: int, is_snapshot: bool) -> None:
        """A pull of one block's value was answered, perhaps with nothing new."""
        traffic = self._of("pull", group, encoding)
        traffic.payload_bytes += payload_bytes
        traffic.elements += elements
        if is_snapshot:
            traffic.snapshots += 1
            traffic.snapshot_bytes += payload_bytes

    def _of(self, way: Way, group: str, encoding: str) -> Traffic:
        traffic = self._traffic.get((way, group, encoding))
        if traffic is None:
            traffic = self._traffic[way, group, encoding] = Traffic()
        return traffic

    def kept(self) -> TelemetryState:
        """What a restart goes on from."""
        return TelemetryState(
            pushes=self.pushes,
            pulls=self.pulls,
            updates=self.updates,
            duplicates=self.duplicates,
            traffic=self.traffic_rows(),
            staleness=self.staleness_rows(),
        )

    def restore(self, state: TelemetryState) -> None:
        """Go on from what was kept; nothing was counted yet."""
        self.add(state)

    def add(self, state: TelemetryState) -> None:
        """Count what was counted elsewhere, too."""
        self.pushes += state.pushes
        self.pulls += state.pulls
        self.updates += state.updates
        self.duplicates += state.duplicates
        for row in state.traffic:
            traffic = self._of(row.way, row.group, row.encoding)
            traffic.payload_bytes += row.payload_bytes
            traffic.elements += row.elements
            traffic.snapshots += row.snapshots
            traffic.snapshot_bytes += row.snapshot_bytes
        for counted in state.staleness:
            histogram = self._staleness.setdefault((counted.worker, counted.group), StalenessHistogram())
            histogram.counts = add_counts([histogram.counts, counted.counts])
            histogram.total += counted.total

    def traffic_rows(self) -> tuple[TrafficRow, ...]:
        return tuple(
            TrafficRow(
                way=way,
                group=group,
                encoding=encoding,
                payload_bytes=traffic.payload_bytes,
                elements=traffic.elements,
                snapshots=traffic.snapshots,
                snapshot_bytes=traffic.snapshot_bytes,
            )
            for (way, group, encoding), traffic in sorted(self._traffic.items())
        )

    def staleness_rows(self) -> tuple[StalenessRow, ...]:
        return tuple(
            StalenessRow(worker, group, tuple(histogram.counts), histogram.total)
            for (worker, group), histogram in sorted(self._staleness.items())
        )
