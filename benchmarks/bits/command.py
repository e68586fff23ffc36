"""`python -m benchmarks bits`: which cells are run, in which order, and the table of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.bits import confirmation
from benchmarks.bits.records import Key, Record, read_records
from benchmarks.bits.report import show_records
from benchmarks.bits.settings import Cell, Setting, parse_setting, with_references
from benchmarks.bits.simulation import Start, make_start, simulate
from benchmarks.bits.tasks import TASKS
from benchmarks.options import positive
from paramserver.cli.bench.crew import MeasurementError

DEFAULT = ("int4/ternary", "int4/coded", "adaptive/coded", "ternary/ternary+worker", "sign/ternary+worker")


def cells(
    tasks: Sequence[str],
    settings: Sequence[Setting],
    workers: Sequence[int],
    seeds: Sequence[int],
    steps: int | None = None,
    warm_up: int | None = None,
    is_alone: bool = False,
) -> Iterator[Cell]:
    """Seed by seed, so that a sweep that is cut short has whole pairs."""
    for seed in seeds:
        for task in tasks:
            budget = TASKS[task]
            for count in workers:
                for setting in settings if is_alone else with_references(settings, count):
                    before = budget.warm_up if warm_up is None else warm_up
                    yield Cell(task, setting, count, seed, steps or budget.steps, before)


def run(wanted: Sequence[Cell], out: Path | None) -> list[Record]:
    """Simulate each cell, but for those that `out` has already, to which the others are appended."""
    known: dict[Key, Record] = {}
    if out is not None and out.exists():
        known = {record.cell.key: record for record in read_records([out])}
    records: list[Record] = []
    start: tuple[tuple[str, int], Start] | None = None
    for cell in wanted:
        record = known.get(cell.key)
        if record is None:
            if start is None or start[0] != (cell.task, cell.seed):
                job = cell.job()
                start = (cell.task, cell.seed), make_start(job, cell.seed, cell.warm_up)
            try:
                record = Record(cell, simulate(cell, start[1]))
            except MeasurementError as error:
                # A setting that diverges is a result, too: the others go on.
                print(f"{cell.task}, {cell.setting.label}, {cell.workers} workers: {error}", file=sys.stderr)
                continue
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    file.write(record.line() + "\n")
            print(record.line(), file=sys.stderr, flush=True)
        records.append(record)
    return records


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks bits",
        description="Loss and bits of settings such as int4/ternary, sign/ternary+worker or int4/ternary+forgetful.",
    )
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=["char-lm"])
    parser.add_argument("--workers", type=positive, nargs="+", default=[8])
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; with --confirm 0")
    parser.add_argument("--steps", type=positive, help="of all workers together (default: the task's)")
    parser.add_argument("--warm-up", type=int, help="steps of one process before (default: the task's)")
    parser.add_argument("--alone", action="store_true", help="run no references but those that are listed")
    parser.add_argument("--out", type=Path, help="append each cell as a line of JSON, and leave out what is there")
    parser.add_argument("--read", type=Path, nargs="+", help="run nothing; show what these files hold")
    parser.add_argument(
        "--confirm", action="store_true", help="run each setting as a job of real processes, a seed a launch"
    )
    parser.add_argument("settings", nargs="*", default=[], help=f"PUSH/PULL[+worker][+forgetful] (default {DEFAULT})")
    given = parser.parse_args(arguments)
    if given.read:
        show_records(read_records(given.read))
        return
    settings = [parse_setting(text) for text in given.settings or DEFAULT]
    if given.confirm:
        if given.alone or given.warm_up is not None:
            parser.error("--confirm runs from the first step and with its references: leave out --alone and --warm-up")
        confirmation.run(given.tasks, settings, given.workers, given.seeds or [0], given.steps, given.out)
        return
    seeds = given.seeds or [0, 1, 2]
    wanted = list(cells(given.tasks, settings, given.workers, seeds, given.steps, given.warm_up, given.alone))
    show_records(run(wanted, given.out))
