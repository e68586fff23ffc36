"""What every benchmark prints alike: the machine, the versions, medians with their spread, ratios."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "numpy", "numba", "pyzmq", "msgspec")


def machine() -> dict[str, str]:
    """The facts without which a figure means nothing."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    packages = {package: version(package) for package in PACKAGES}
    return {"cpu": model, "cores": str(os.cpu_count()), "python": platform.python_version(), **packages}


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """Median with the smallest and largest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], facts: Mapping[str, object]) -> None:
    """Print a table, the machine under it, and the figures as one line of JSON for other programs."""
    console = Console(width=max(100, min(160, Console().width)))
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(json.dumps({"machine": machine(), **facts}))
