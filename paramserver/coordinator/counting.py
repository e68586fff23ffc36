"""What all processes that served a part have counted, so that no figure falls back when one takes over from another.

Counters of the state itself (updates, staleness, editions, pushed bits) go on from the journal and are taken as they
are. Those of messages begin at nothing in every process: they are added up. Those that a journal's snapshot holds go on
from the last snapshot: what came after it in the process before is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import structs

from paramserver.protocol.messages import PartReport, TrafficRow

OF_MESSAGES = ("bytes_in", "bytes_out", "journal_bytes")
OF_SNAPSHOTS = ("duplicates", "pushes", "pulls")

Counts = Counter[str]


class PartCounts:
    """Of one part. `stored` is what `progress` of an earlier coordinator returned."""

    def __init__(self, stored: Mapping[str, Any] | None = None) -> None:
        stored = stored or {}
        self._process = str(stored.get("process", ""))  # the one that counts now
        self._last = Counter[str](stored.get("last", {}))  # what it counted
        self._before = Counter[str](stored.get("before", {}))  # what is to be added to that
        self._earlier: dict[str, Counts] = {}  # the last counts of the others; they are in `before`

    def progress(self) -> dict[str, Any]:
        return {"process": self._process, "last": dict(self._last), "before": dict(self._before)}

    def take(self, shard: str, incarnation: int, report: PartReport) -> PartReport:
        """The report with what earlier processes had counted."""
        process, counts = f"{shard}/{incarnation}", _counts(report)
        if process != self._process:
            self._change_process(process, counts)
        for name, value in self._last.items():
            if _is_summed(name) and counts[name] < value:  # it took the part up anew
                self._before[name] += value
        self._last = counts
        return _with(report, counts + self._before)

    def _change_process(self, process: str, counts: Counts) -> None:
        self._earlier[self._process] = self._last
        total = self._last + self._before
        self._before = Counter(
            {name: value if _is_summed(name) else max(0, value - counts[name]) for name, value in total.items()}
        )
        for name, value in self._earlier.get(process, Counts()).items():
            if _is_summed(name) and counts[name] >= value:  # it served before, and goes on with its own counts
                self._before[name] -= value
        self._process, self._last = process, Counter()


def _is_summed(name: str) -> bool:
    return name in OF_MESSAGES or name.startswith("refusal ")


def _counts(report: PartReport) -> Counts:
    found = Counter({name: getattr(report, name) for name in (*OF_MESSAGES, *OF_SNAPSHOTS)})
    found.update({f"refusal {code}": number for code, number in report.refusals.items()})
    for row in report.traffic:
        if row.way == "pull":
            for name in _ROW:
                found[_row_key(row, name)] = getattr(row, name)
    return found


_ROW = ("payload_bytes", "elements", "snapshots", "snapshot_bytes")


def _row_key(row: TrafficRow, name: str) -> str:
    return "pull " + msgspec.json.encode([row.group, row.encoding, name]).decode()


def _with(report: PartReport, counts: Counts) -> PartReport:
    """The report with these counts in place of its own."""
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for key, value in counts.items():
        if key.startswith("pull "):
            group, encoding, name = msgspec.json.decode(key.removeprefix("pull "))
            rows.setdefault((group, encoding), {})[name] = value
    pulls = [TrafficRow("pull", group, encoding, **values) for (group, encoding), values in rows.items()]
    return structs.replace(
        report,
        **{name: counts[name] for name in (*OF_MESSAGES, *OF_SNAPSHOTS)},
        refusals={
            name.removeprefix("refusal "): value for name, value in counts.items() if name.startswith("refusal ")
        },
        traffic=(*[row for row in report.traffic if row.way != "pull"], *pulls),
    )
