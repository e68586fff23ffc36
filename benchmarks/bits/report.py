"""The table of a sweep: losses and paired gaps beside bits and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

from benchmarks.bits.records import Record
from benchmarks.bits.settings import references
from benchmarks.bits.simulation import Outcome
from benchmarks.bits.statistics import Gap, paired_gap
from benchmarks.report import show

COLUMNS = (
    "task", "N", "push / pull", "train", "unflushed", "weights", "replica", "train, fresh", "weights, fresh",
    "bits up", "down", "fewer", "n",
)  # fmt: skip
EQUAL = ("train_loss", "unflushed_loss", "weights_loss", "replica_loss")
FRESHER = ("train_loss", "weights_loss")


class Row(NamedTuple):
    """The cells of one setting that differ by their seed only."""

    task: str
    workers: int
    text: str


Rows = Mapping[Row, Mapping[int, Record]]  # by seed


def grouped(records: Sequence[Record]) -> Rows:
    rows: dict[Row, dict[int, Record]] = {}
    for record in records:
        cell = record.cell
        rows.setdefault(Row(cell.task, cell.workers, cell.setting.text), {})[cell.seed] = record
    return rows


def gap(rows: Rows, row: Row, reference: str, name: str) -> Gap | None:
    """Over the seeds that both have; None where the reference was not run."""
    others = rows.get(Row(row.task, row.workers, reference), {})
    seeds = sorted(rows[row].keys() & others.keys())
    if not seeds:
        return None
    own = [getattr(rows[row][seed].outcome, name) for seed in seeds]
    return paired_gap(own, [getattr(others[seed].outcome, name) for seed in seeds])


def fewer_bytes(rows: Rows, row: Row) -> float | None:
    """Messages both ways of the same optimiser at full precision with fresh weights, over this setting's."""
    first = next(iter(rows[row].values()))
    fresh, _ = references(first.cell.setting.where, row.workers)
    others = rows.get(Row(row.task, row.workers, fresh), {})
    seeds = rows[row].keys() & others.keys()
    if not seeds:
        return None
    return sum(map(_both_ways, (others[seed].outcome for seed in seeds))) / sum(
        map(_both_ways, (rows[row][seed].outcome for seed in seeds))
    )


def _both_ways(outcome: Outcome) -> int:
    return outcome.pushed_bytes + outcome.pulled_bytes


def _mean(rows: Rows, row: Row, name: str) -> float:
    values = [getattr(record.outcome, name) for record in rows[row].values()]
    return float(sum(values) / len(values))


def _table_row(rows: Rows, row: Row) -> list[str]:
    setting = next(iter(rows[row].values())).cell.setting
    fresh, same_period = references(setting.where, row.workers)
    gaps = [gap(rows, row, same_period, name) for name in EQUAL] + [gap(rows, row, fresh, name) for name in FRESHER]
    fewer = fewer_bytes(rows, row)
    return [
        row.task, str(row.workers), setting.label, *("-" if one is None else str(one) for one in gaps),
        f"{_mean(rows, row, 'push_bits'):.2f}", f"{_mean(rows, row, 'pull_bits'):.2f}",
        "-" if fewer is None else f"{fewer:.1f}x", str(len(rows[row])),
    ]  # fmt: skip


def show_records(records: Sequence[Record]) -> None:
    """Means over seeds, and gaps paired by seed with their 95% intervals."""
    rows = grouped(records)
    ordered = sorted(rows, key=lambda row: (row.task, row.workers))  # stable: settings in their order
    show(
        "gaps of loss to fp32 at the same period, then with fresh weights; bits of an encoded element and worker step",
        COLUMNS,
        [_table_row(rows, row) for row in ordered],
        {
            "benchmark": "bits",
            "results": [
                {"task": row.task, "workers": row.workers, "setting": row.text, "seed": seed, **asdict(record.outcome)}
                for row in ordered
                for seed, record in sorted(rows[row].items())
            ],
        },
    )
