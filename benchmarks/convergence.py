"""Convergence: bits a character at equal examples, one process of plain torch against asynchronous workers.

The same text, the same segments, the same batches, the same number of steps in all, one learning rate
(tuned on the plain process). Ours runs as a user runs it: `paramserver run`, fp32 both ways.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.options import positive
from benchmarks.report import show

ARGUMENTS = {"task": "char-lm", "cell": "lstm", "hidden": 128}
CHARACTERS_A_STEP = 16 * 64
LEARNING_RATES = {"adagrad": 0.1, "adam": 0.006}  # the best of a sweep with benchmarks/plain.py
CURVE_AT = (0.25, 0.5, 0.75, 1.0)


def _data(steps: int) -> dict[str, Any]:
    return {"name": "python-source", "batch": 16, "window": 64, "windows": 16, "max_chars": steps * CHARACTERS_A_STEP}


def plain(optimizer: str, steps: int, seed: int, max_chars: int) -> dict[str, Any]:
    """One process of plain torch; its report as benchmarks/plain.py prints it."""
    command = [
        sys.executable, "-m", "benchmarks.plain", "--optimizer", optimizer, "--lr", str(LEARNING_RATES[optimizer]),
        "--hidden", str(ARGUMENTS["hidden"]), "--max-chars", str(max_chars), "--steps", str(steps), "--seed", str(seed),
    ]  # fmt: skip
    report: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return report


def asynchronous(optimizer: str, steps: int, seed: int, workers: int) -> dict[str, Any]:
    """One epoch with so many asynchronous workers and two shards; the run's result, its curve added."""
    job = {
        "name": "convergence",
        "seed": seed,
        "model": {"family": "recurrent", "args": ARGUMENTS},
        "data": _data(steps),
        "cluster": {"shards": 2, "workers": workers},
        "push": {"encoding": "fp32"},
        "pull": {"encoding": "fp32"},
        "optimizer": {"name": optimizer, "lr": LEARNING_RATES[optimizer]},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.yaml")
        path.write_text(yaml.safe_dump(job), encoding="utf-8")
        command = [sys.executable, "-m", "paramserver.cli", "run", str(path), "--runs", folder, "--json"]
        result: dict[str, Any] = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        )
        lines = Path(folder, "convergence", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [point for point in map(json.loads, lines) if point["bits"] is not None]
    last = max(point["examples"] for point in points)
    result["curve"] = [
        (int(share * last), round(min(points, key=lambda p: abs(p["examples"] - share * last))["bits"], 3))
        for share in CURVE_AT
    ]
    return result


def run(
    steps: int, seeds: Sequence[int], workers: Sequence[int], optimizers: Sequence[str] = ("adagrad", "adam")
) -> None:
    """Print the paired table."""
    started = time.monotonic()
    rows: list[list[str]] = []
    facts: list[dict[str, Any]] = []
    bigram = 0.0
    for optimizer in optimizers:
        reference: dict[int, float] = {}
        found: dict[int, dict[int, dict[str, Any]]] = {count: {} for count in workers}
        for seed in seeds:
            for count in workers:
                found[count][seed] = asynchronous(optimizer, steps, seed, count)
            taken = found[workers[0]][seed]["steps"]
            report = plain(optimizer, taken, seed, _data(steps)["max_chars"])
            reference[seed] = report["result"]["valid_bits"]
            bigram = report["floors_valid_bits"]["bigram"]
        mean = sum(reference.values()) / len(reference)
        rows.append([optimizer, "1, plain torch", f"{mean:.4f}", "-", "-", "-", f"{taken}"])
        for count in workers:
            bits = {seed: result["valid"]["bits"] for seed, result in found[count].items()}
            gaps = [100 * (bits[seed] / reference[seed] - 1) for seed in seeds]
            staleness = [result["staleness"]["all"]["mean"] for result in found[count].values()]
            rows.append(
                [
                    optimizer,
                    f"{count} asynchronous",
                    f"{sum(bits.values()) / len(bits):.4f}",
                    f"{sum(gaps) / len(gaps):+.2f}%",
                    " ".join(f"{gap:+.2f}" for gap in gaps),
                    f"{sum(staleness) / len(staleness):.2f}",
                    " ".join(str(result["steps"]) for result in found[count].values()),
                ]
            )
            facts.append(
                {
                    "optimizer": optimizer,
                    "workers": count,
                    "valid_bits": bits,
                    "plain_valid_bits": reference,
                    "gaps_percent": gaps,
                    "curves": {seed: result["curve"] for seed, result in found[count].items()},
                }
            )
    rows.append(["-", "bigram model", f"{bigram:.4f}", "-", "-", "-", "-"])
    show(
        "validation bits a character at equal examples, python-source, LSTM 128, fp32 both ways",
        ["optimizer", "processes", "bits", "paired gap", "gap by seed", "mean staleness", "steps"],
        rows,
        {
            "benchmark": "convergence",
            "learning_rates": LEARNING_RATES,
            "results": facts,
            "seconds": time.monotonic() - started,
        },
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="200 steps, one seed, 2 workers")
    parser.add_argument("--steps", type=positive, help="of all workers together (default 1200)")
    parser.add_argument("--seeds", type=positive, help="how many (default 3)")
    parser.add_argument("--workers", type=positive, nargs="+", help="numbers of workers (default 2 4)")
    given = parser.parse_args(arguments)
    run(
        steps=given.steps or (200 if given.quick else 1200),
        seeds=range(given.seeds or (1 if given.quick else 3)),
        workers=given.workers or ((2,) if given.quick else (2, 4)),
    )
