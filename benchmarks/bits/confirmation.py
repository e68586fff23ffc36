"""The same settings as jobs of real processes, one run each, from the first step on."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.bits.settings import Cell, Setting, references, with_references
from benchmarks.bits.tasks import TASKS
from benchmarks.report import show
from paramserver.cli.bench.crew import MeasurementError

LIMIT_SECONDS = 1200
COLUMNS = (
    "task", "N", "push / pull", "valid", "gap", "gap, fresh", "replica", "bits up", "bits down", "fewer bytes",
    "staleness",
)  # fmt: skip


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
    tasks: Sequence[str], settings: Sequence[Setting], workers: Sequence[int], steps: int | None, out: Path | None
) -> None:
    """Print the table; gaps are to the references' one run. Twice the simulation's steps, as there is no warm-up."""
    rows: list[list[str]] = []
    facts: list[dict[str, Any]] = []
    for task in tasks:
        for count in workers:
            results: dict[str, dict[str, Any]] = {}
            for setting in with_references(settings, count):
                cell = Cell(task, setting, count, 0, steps or 2 * TASKS[task].steps, 0)
                results[setting.text] = run_job(cell)
                fact = {"task": task, "workers": count, "setting": setting.text, "result": results[setting.text]}
                facts.append(fact)
                if out is not None:
                    with out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(fact) + "\n")
                print(task, count, setting.text, results[setting.text]["valid"]["bits"], file=sys.stderr, flush=True)
            # Both references are there only now.
            rows += [_row(task, count, setting, results) for setting in with_references(settings, count)]
    show("one run of real processes each", COLUMNS, rows, {"benchmark": "bits", "confirmed": facts})


def _row(task: str, workers: int, setting: Setting, results: dict[str, dict[str, Any]]) -> list[str]:
    fresh, same_period = (results[text] for text in references(setting.where, workers))
    own = results[setting.text]

    def gap(other: dict[str, Any]) -> str:
        return f"{100 * (own['valid']['bits'] / other['valid']['bits'] - 1):+.2f}%"

    def bits(way: str) -> str:
        encoded = own[f"{way}_bits_encoded"]
        return f"{own[f'{way}_bits_an_element'] if encoded is None else encoded:.2f}"

    def bytes_a_step(result: dict[str, Any]) -> float:
        return float((result["pushed_bytes"] + result["pulled_bytes"]) / result["steps"])

    replica = own["replica"]["valid"]["bits"]
    return [
        task, str(workers), setting.label, f"{own['valid']['bits']:.4f}", gap(same_period), gap(fresh),
        "-" if replica is None else f"{replica:.4f}", bits("push"), bits("pull"),
        f"{bytes_a_step(fresh) / bytes_a_step(own):.1f}x", f"{own['staleness']['all']['mean']:.2f}",
    ]  # fmt: skip
