"""Telemetry: the last report of every process of a job, and the figures that they add up to.

Reports are counters that only grow, so the last one of a process is all that it ever counted. A peer may
report nonsense: what is not finite or not a histogram is left out here and never reaches a figure.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from msgspec import structs

from paramserver.coordinator.counting import PartCounts
from paramserver.encoding.layers import FULL_PRECISION
from paramserver.protocol.messages import PartReport, ShardReport, StalenessRow, TrafficRow, WorkerReport
from paramserver.shard.staleness import LOWER_EDGES, add_counts, summarise

MOST_PROCESSES = 16_384  # incarnations that one job's counters are kept of; the oldest are forgotten
RATE_SECONDS = 5.0  # rates are means over the last so many seconds


def finite(value: float) -> float:
    """The value, or 0 where a peer sent none that exists."""
    return value if math.isfinite(value) else 0.0


def plain(value: Any) -> Any:
    """The same JSON value with None for every number that JSON cannot hold: sums of nonsense overflow."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def slim(report: ShardReport | WorkerReport) -> ShardReport | WorkerReport:
    """A report without what is taken in when it comes and need not be kept: a layout may have megabytes."""
    if isinstance(report, ShardReport):
        return report
    return structs.replace(report, layout=None, examples={}, returned=(), done=(), begun=())


R = TypeVar("R")


def _keep(reports: dict[tuple[str, int], R], key: tuple[str, int], report: R) -> None:
    reports[key] = report
    if len(reports) > MOST_PROCESSES:
        del reports[next(iter(reports))]


def ratio(above: float, below: float) -> float | None:
    """None where there is nothing to divide by."""
    return above / below if below else None


def bits(nats: float | None) -> float | None:
    return None if nats is None else nats / math.log(2)


class Telemetry:
    """Of one job. Processes are kept by (name, incarnation): what a dead one counted stays counted."""

    def __init__(self) -> None:
        self.parts: dict[str, PartReport] = {}
        """Of their primaries; counts of messages are those of all processes that served the part."""
        self.backups: dict[str, PartReport] = {}
        self.shards: dict[tuple[str, int], ShardReport] = {}
        self.workers: dict[tuple[str, int], WorkerReport] = {}
        self._counts: dict[str, PartCounts] = {}
        self._samples: deque[tuple[float, dict[str, float]]] = deque()

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Go on from what `progress` of an earlier coordinator returned."""
        self._counts = {part: PartCounts(counts) for part, counts in stored.items()}

    def progress(self) -> dict[str, Any]:
        """What a successor cannot hear from the processes that live; the caller stores it."""
        return {part: counts.progress() for part, counts in self._counts.items()}

    def take_part(self, shard: str, incarnation: int, report: PartReport) -> None:
        """A report of the part's primary."""
        self.parts[report.part] = self._counts.setdefault(report.part, PartCounts()).take(shard, incarnation, report)

    def take_shard(self, name: str, incarnation: int, report: ShardReport) -> None:
        _keep(self.shards, (name, incarnation), report)

    def take_worker(self, name: str, incarnation: int, report: WorkerReport) -> None:
        kept = slim(report)
        assert isinstance(kept, WorkerReport)
        _keep(self.workers, (name, incarnation), kept)

    @property
    def steps(self) -> int:
        return sum(report.steps for report in self.workers.values())

    @property
    def finished_examples(self) -> float:
        return sum(finite(report.finished_examples) for report in self.workers.values())

    def loss(self) -> float | None:
        """The workers' last training loss, nats an element: the mean over those that have made a step."""
        losses = [report.loss for report in self._trained() if math.isfinite(report.loss)]
        return sum(losses) / len(losses) if losses else None

    def _trained(self) -> list[WorkerReport]:
        """Of each worker the last incarnation that has made a step: what a dead one had learned is old by now."""
        found = {name: report for (name, _), report in sorted(self.workers.items()) if report.steps}
        return list(found.values())

    def metrics(self) -> dict[str, float]:
        """The workers' last training metrics by name, an element: means over those that report them."""
        found: dict[str, list[float]] = {}
        for report in self._trained():
            for name, value in report.metrics.items():
                if math.isfinite(value):
                    found.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in sorted(found.items())}

    def sample(self, now: float, totals: dict[str, float]) -> dict[str, float]:
        """Rates a second of totals that grow, over the last RATE_SECONDS."""
        if not self._samples or now > self._samples[-1][0]:
            self._samples.append((now, totals))
        while len(self._samples) > 2 and now - self._samples[1][0] >= RATE_SECONDS:
            self._samples.popleft()
        then, before = self._samples[0]
        elapsed = now - then
        # A process that took its job up again counts from 0: no rate is better than a negative one.
        return {
            name: max(0.0, total - before.get(name, 0.0)) / elapsed if elapsed else 0.0
            for name, total in totals.items()
        }

    def forget_samples(self) -> None:
        """Take rates from now on: the totals were those of some processes only."""
        self._samples.clear()

    def totals(self) -> dict[str, float]:
        """What rates are taken of."""
        shards = self.parts.values()
        return {
            "examples": self.finished_examples,
            "steps": self.steps,
            "updates": sum(report.updates for report in shards),
            "pushed_bytes": sum(report.bytes_in for report in shards),
            "pulled_bytes": sum(report.bytes_out for report in shards),
        }

    def traffic(self) -> dict[str, Any]:
        """Bytes and resolution each way, over the whole job; encoded and full-precision blocks also apart.

        The bits of a pull are those of an element and pull, whatever came of it: some deltas or nothing. Snapshots,
        for whom the log of deltas does not reach back to, count in the bytes and are told apart.
        """
        shards = list(self.parts.values())
        rows = [row for report in shards for row in report.traffic]
        figures: dict[str, Any] = {
            "pushed_bytes": sum(report.bytes_in for report in shards),
            "pulled_bytes": sum(report.bytes_out for report in shards),
        }
        for way in ("push", "pull"):
            own = [row for row in rows if row.way == way]
            encoded = [row for row in own if row.encoding != FULL_PRECISION]
            figures[f"{way}_bits_an_element"] = _bits(own)
            figures[f"{way}_bits_encoded"] = _bits(encoded)
            figures[f"{way}_bits_full_precision"] = _bits([row for row in own if row.encoding == FULL_PRECISION])
            payload, elements = sum(row.payload_bytes for row in own), sum(row.elements for row in own)
            figures[f"{way}_compression"] = ratio(4 * elements, payload)
        figures["snapshots"] = sum(row.snapshots for row in rows)
        figures["snapshot_bytes"] = sum(row.snapshot_bytes for row in rows)
        figures["editions"] = sum(report.editions for report in shards)
        figures["publish_period"] = max((report.publish_period for report in shards), default=0)
        figures["replica_distance"] = max((finite(report.replica_distance) for report in shards), default=0.0)
        return figures

    def layers(self) -> dict[str, Any]:
        """What each group's blocks cost, by way and encoding: where the bits go."""
        found: dict[str, Any] = {}
        for report in self.parts.values():
            for row in report.traffic:
                ways = found.setdefault(row.group, {"push": {}, "pull": {}})
                if row.way in ways:
                    ways[row.way].setdefault(row.encoding, []).append(row)
        return {
            group: {
                way: {
                    encoding: {
                        "bits_an_element": _bits(rows),
                        "payload_bytes": sum(row.payload_bytes for row in rows),
                        "snapshots": sum(row.snapshots for row in rows),
                    }
                    for encoding, rows in encodings.items()
                }
                for way, encodings in ways.items()
            }
            for group, ways in sorted(found.items())
        }

    def staleness(self) -> dict[str, Any]:
        """In all and by worker, shard and group."""
        rows = [
            (shard, row)
            for shard, report in sorted(self.parts.items())
            for row in report.staleness
            if len(row.counts) <= len(LOWER_EDGES)
        ]
        return {
            "all": _summary(row for _, row in rows),
            "by_worker": {
                name: _summary(row for _, row in rows if row.worker == name)
                for name in sorted({row.worker for _, row in rows})
            },
            "by_shard": {
                name: _summary(row for shard, row in rows if shard == name)
                for name in sorted({shard for shard, _ in rows})
            },
            "by_group": {
                name: _summary(row for _, row in rows if row.group == name)
                for name in sorted({row.group for _, row in rows})
            },
        }

    def refusals(self) -> dict[str, int]:
        """By name, as the shards refused them."""
        counts: Counter[str] = Counter()
        for part in self.parts.values():
            counts.update(part.refusals)
        for shard in self.shards.values():
            counts.update(shard.refusals)
        return dict(sorted(counts.items()))

    def faults(self) -> dict[str, int]:
        """What was survived: by name, over all processes."""
        shards, workers = self.shards.values(), self.workers.values()
        return {
            "duplicates": sum(report.duplicates for report in self.parts.values()),
            "dropped_answers": sum(report.dropped for report in shards),
            "handshake_failures": sum(report.handshake_failures for report in shards),
            "retries": sum(report.retries for report in workers),
            "reconnections": sum(report.reconnections for report in workers),
            "skipped_steps": sum(report.skipped_steps for report in workers),
        }

    def holding_back(self) -> dict[str, str]:
        """Parts that acknowledge nothing now, and why."""
        whys = {name: report.refusing_disk or report.waiting_for for name, report in sorted(self.parts.items())}
        return {name: why for name, why in whys.items() if why}

    def by_part(self) -> dict[str, Any]:
        return {
            name: {
                "blocks": report.blocks,
                "initialised_blocks": report.initialised_blocks,
                "elements": report.elements,
                "updates": report.updates,
                "duplicates": report.duplicates,
                "pushes": report.pushes,
                "pulls": report.pulls,
                "parked_pulls": report.parked_pulls,
                "pending_updates": report.pending_updates,
                "unpublished": report.unpublished,
                "editions": report.editions,
                "publish_period": report.publish_period,
                "replica_distance": finite(report.replica_distance),
                "bytes_in": report.bytes_in,
                "bytes_out": report.bytes_out,
                "refusals": dict(report.refusals),
                "journal_bytes": report.journal_bytes,
                "record": report.record,
                "refusing_disk": report.refusing_disk,
                "waiting_for": report.waiting_for,
            }
            for name, report in sorted(self.parts.items())
        }

    def by_process(self) -> dict[str, Any]:
        """Of each shard process: the parts that it holds, and how it spends its time."""
        return {
            name: {
                "parts": {report.part: report.role for report in shard.parts},
                "waiting_seconds": finite(shard.waiting_seconds),
                "working_seconds": finite(shard.working_seconds),
                "refusals": dict(shard.refusals),
                "handshake_failures": shard.handshake_failures,
                "dropped": shard.dropped,
            }
            for name, shard in self._processes().items()
        }

    def _processes(self) -> dict[str, ShardReport]:
        """By name; of several incarnations the last."""
        return {name: report for (name, _), report in sorted(self.shards.items())}

    def by_worker(self) -> dict[str, Any]:
        """By name; of several incarnations the last."""
        return {
            name: {
                "incarnation": incarnation,
                "stage": report.stage,
                "device": report.device,
                "steps": report.steps,
                "finished_examples": finite(report.finished_examples),
                "loss": finite(report.loss) if report.steps else None,
                "skipped_steps": report.skipped_steps,
                "leases_held": len(report.held),
                "in_flight": report.in_flight,
                "residual_norm": finite(report.residual_norm),
                "push_bytes": report.push_bytes,
                "pull_bytes": report.pull_bytes,
                "retries": report.retries,
                "reconnections": report.reconnections,
                "waiting_seconds": finite(report.waiting_seconds),
                "working_seconds": finite(report.working_seconds),
                "refusals": dict(report.refusals),
            }
            for (name, incarnation), report in sorted(self.workers.items())
        }

    def _last_workers(self) -> dict[str, WorkerReport]:
        """By name; of several incarnations the last."""
        return {name: report for (name, _), report in sorted(self.workers.items())}

    def queues(self) -> dict[str, int]:
        """Depths now."""
        return {
            "parked_pulls": sum(report.parked_pulls for report in self.parts.values()),
            "pending_updates": sum(report.pending_updates for report in self.parts.values()),
            "in_flight": sum(report.in_flight for report in self._last_workers().values()),
        }

    def residual_norm(self) -> float:
        """Of all workers' residuals taken as one vector."""
        return math.hypot(*(finite(report.residual_norm) for report in self._last_workers().values()))


def _bits(rows: Iterable[TrafficRow]) -> float | None:
    """Bits an element, snapshots left out; None where no element was sent."""
    rows = list(rows)
    payload_bytes = sum(row.payload_bytes - row.snapshot_bytes for row in rows)
    return ratio(8 * payload_bytes, sum(row.elements - row.snapshot_bytes // 4 for row in rows))


def _summary(rows: Iterable[StalenessRow]) -> dict[str, Any]:
    kept = list(rows)
    summary = asdict(summarise(add_counts([row.counts for row in kept]), sum(row.total for row in kept)))
    summary["histogram"] = {str(edge): count for edge, count in summary["histogram"].items()}
    return summary
