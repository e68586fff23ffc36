"""A shard's counters. They only grow while a job is served; whoever reads them takes differences."""

from __future__ import annotations

from paramserver.protocol.messages import StalenessRow
from paramserver.shard.staleness import StalenessHistogram


class Telemetry:
    """Counted on the hot path, read by the report twice a second."""

    def __init__(self) -> None:
        self.pushes = 0
        self.pulls = 0
        self.updates = 0  # of blocks, duplicates not counted
        self.duplicates = 0
        self.push_payload_bytes = 0
        self.push_elements = 0
        self.pull_payload_bytes = 0
        self.pull_elements = 0
        self._staleness: dict[tuple[str, str], StalenessHistogram] = {}

    def applied(self, worker: str, group: str, staleness: int, payload_bytes: int, elements: int) -> None:
        """One block update became part of the state, `staleness` versions after the edition it was computed on."""
        self.updates += 1
        self.push_payload_bytes += payload_bytes
        self.push_elements += elements
        histogram = self._staleness.get((worker, group))
        if histogram is None:
            histogram = self._staleness[worker, group] = StalenessHistogram()
        histogram.add(staleness)

    def pulled(self, payload_bytes: int, elements: int) -> None:
        """One block's value left the shard."""
        self.pull_payload_bytes += payload_bytes
        self.pull_elements += elements

    def staleness_rows(self) -> tuple[StalenessRow, ...]:
        return tuple(
            StalenessRow(worker, group, tuple(histogram.counts), histogram.total)
            for (worker, group), histogram in sorted(self._staleness.items())
        )
