"""Each benchmark, in little, from the command that the docs name: it ends, and its last line has figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Processes = Callable[[], list[Any]]

ROOT = Path(__file__).parents[2]
IN_LITTLE = {
    "apply": ["--rounds", "1", "--seconds", "0.2"],
    "exchange": ["--rounds", "1", "--seconds", "0.2", "--sizes", "100k", "--grids", "2", "--pairs", "int4/ternary"],
    "durability": ["--rounds", "1", "--seconds", "0.2", "--sizes", "100k"],
    "lstm": ["--rounds", "1", "--seconds", "0.3", "--no-job", "--pairs", "int4/ternary"],
    "convergence": ["--steps", "20", "--seeds", "1", "--workers", "2"],
}  # fmt: skip
LONG = ("durability", "lstm", "convergence")


# One that starts many processes after another takes long on two cores.
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in IN_LITTLE])
@pytest.mark.timeout(400)
def test_a_benchmark_runs_to_its_figures(name: str, processes: Processes) -> None:
    command = [sys.executable, "-m", "benchmarks", name, *IN_LITTLE[name]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=390, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["benchmark"] == name
    assert facts["results"]
    assert "NaN" not in done.stdout
    assert processes() == []
