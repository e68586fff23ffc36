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
    "task", "N", "push / pull", "train", "train gap", "valid gap", "replica gap", "train, fresh", "valid, fresh",
    "bits up", "bits down", "fewer bytes",
)  # fmt: skip


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
    gaps = [
        gap(rows, row, reference, name)
        for reference, name in (
            (same_period, "train_loss"), (same_period, "weights_loss"), (same_period, "replica_loss"),
            (fresh, "train_loss"), (fresh, "weights_loss"),
        )
    ]  # fmt: skip
    fewer = fewer_bytes(rows, row)
    return [
        row.task, str(row.workers), setting.label, f"{_mean(rows, row, 'train_loss'):.4f}",
        *("-" if one is None else str(one) for one in gaps),
        f"{_mean(rows, row, 'push_bits'):.2f}", f"{_mean(rows, row, 'pull_bits'):.2f}",
        "-" if fewer is None else f"{fewer:.1f}x",
    ]  # fmt: skip


def show_records(records: Sequence[Record]) -> None:
    """Means over seeds, and gaps paired by seed with their 95% intervals."""
    rows = grouped(records)
    ordered = sorted(rows, key=lambda row: (row.task, row.workers))  # stable: settings in their order
    show(
        "bits a symbol, and bits an encoded element and worker step; gaps are to fp32 at the same period, then fresh",
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
