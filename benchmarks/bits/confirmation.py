"""The same settings as jobs of real processes, from the first step on: one launch of each for every seed, in turns."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.bits.settings import Cell, Setting, references, with_references
from benchmarks.bits.statistics import Gap, paired_gap
from benchmarks.bits.tasks import TASKS
from benchmarks.report import show
from paramserver.cli.bench.crew import MeasurementError
from paramserver.cli.errors import InputError

LIMIT_SECONDS = 1800
COLUMNS = (
    "task", "N", "push / pull", "valid", "gap", "gap, fresh", "replica", "bits up", "bits down", "fewer bytes",
    "staleness", "n",
)  # fmt: skip

Result = Mapping[str, Any]  # as `paramserver run --json` prints it
Launch = tuple[str, int, str, int, int]  # task, workers, setting, seed, steps
Launches = dict[Launch, Result]


def run_job(cell: Cell) -> dict[str, Any]:
    """One job under `paramserver run`; its result. Raises MeasurementError where it ends badly."""
    content = cell.content() | {"stop": {"epochs": 1000, "steps": cell.steps}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.yaml")
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        command = [sys.executable, "-m", "paramserver.cli", "run", str(path), "--runs", folder, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    if done.returncode:
        raise MeasurementError(f"the job {cell.task}, {cell.setting.label} failed: {done.stderr.strip()[-400:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def run(
    tasks: Sequence[str],
    settings: Sequence[Setting],
    workers: Sequence[int],
    seeds: Sequence[int],
    steps: int | None,
    out: Path | None,
) -> None:
    """Print the table. Twice the simulation's steps, as there is no warm-up.

    Seed by seed, so that the launches that are compared stand beside each other in time; those that `out` has already
    are not run again, and the others are appended to it.
    """
    done: Launches = _read(out) if out is not None and out.exists() else {}
    wanted: list[Launch] = []
    for cell in _cells(tasks, settings, workers, seeds, steps):
        launch = (cell.task, cell.workers, cell.setting.text, cell.seed, cell.steps)
        wanted.append(launch)
        if launch in done:
            continue
        done[launch] = run_job(cell)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_fact(launch, done[launch])) + "\n")
        print(*launch, done[launch]["valid"]["bits"], file=sys.stderr, flush=True)
    rows = [
        _row(task, count, setting, {launch: done[launch] for launch in wanted})
        for task in tasks
        for count in workers
        for setting in with_references(settings, count)
    ]
    facts = {"benchmark": "bits", "confirmed": [_fact(launch, done[launch]) for launch in wanted]}
    show("real processes, one launch a seed", COLUMNS, rows, facts)


def _cells(
    tasks: Sequence[str], settings: Sequence[Setting], workers: Sequence[int], seeds: Sequence[int], steps: int | None
) -> Iterator[Cell]:
    for task in tasks:
        for count in workers:
            for seed in seeds:
                for setting in with_references(settings, count):
                    yield Cell(task, setting, count, seed, steps or 2 * TASKS[task].steps, 0)


def _fact(launch: Launch, result: Result) -> dict[str, Any]:
    return dict(zip(("task", "workers", "setting", "seed", "steps"), launch, strict=True)) | {"result": result}


def _read(path: Path) -> Launches:
    """Raises InputError for a file that is none of ours."""
    try:
        facts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {
            (fact["task"], fact["workers"], fact["setting"], fact["seed"], fact["steps"]): fact["result"]
            for fact in facts
        }
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not readable as launches of this benchmark: {error}") from None


def _row(task: str, workers: int, setting: Setting, done: Launches) -> list[str]:
    """Means over seeds, and gaps paired by seed."""
    by_setting: dict[str, dict[int, Result]] = {}
    for (other_task, count, text, seed, _), result in done.items():
        if (other_task, count) == (task, workers):
            by_setting.setdefault(text, {})[seed] = result
    fresh, same_period = (by_setting[text] for text in references(setting.where, workers))
    own = by_setting[setting.text]

    def gap(others: Mapping[int, Result]) -> Gap:
        return paired_gap([_bits(own[seed]) for seed in own], [_bits(others[seed]) for seed in own])

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    replicas = [result["replica"]["valid"]["bits"] for result in own.values()]
    return [
        task, str(workers), setting.label, f"{mean([_bits(result) for result in own.values()]):.4f}",
        str(gap(same_period)), str(gap(fresh)), "-" if None in replicas else f"{mean(replicas):.4f}",
        *(f"{mean([_bits_sent(result, way) for result in own.values()]):.2f}" for way in ("push", "pull")),
        f"{sum(map(_bytes_a_step, fresh.values())) / sum(map(_bytes_a_step, own.values())):.1f}x",
        f"{mean([result['staleness']['all']['mean'] for result in own.values()]):.2f}", str(len(own)),
    ]  # fmt: skip


def _bits(result: Result) -> float:
    """The validation loss of the weights."""
    return float(result["valid"]["bits"])


def _bits_sent(result: Result, way: str) -> float:
    """An encoded element and worker step; of all elements where none is encoded."""
    encoded = result[f"{way}_bits_encoded"]
    return float(result[f"{way}_bits_an_element"] if encoded is None else encoded)


def _bytes_a_step(result: Result) -> float:
    return float((result["pushed_bytes"] + result["pulled_bytes"]) / result["steps"])
