"""What every benchmark prints alike: the machine, the versions, medians with their spread, ratios."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "numpy", "numba", "pyzmq", "msgspec")
WIDTH = 120  # columns of a table that goes to a file or a pipe


def machine() -> dict[str, str]:
    """The facts without which a figure means nothing."""
    return {"cpu": _cpu(), "cores": str(os.cpu_count()), "python": platform.python_version(), **_versions()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def figure(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Median with the smallest and largest; the value alone where there is one."""
    if len(values) == 1:
        return figure(values[0])
    return f"{figure(statistics.median(values))} ({figure(min(values))}-{figure(max(values))})"


def show(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    facts: Mapping[str, object],
    as_json: bool | None = None,
) -> None:
    """Print a table and the machine under it, or the figures as one line of JSON for other programs; None: both."""
    if not as_json:
        from rich.console import Console
        from rich.table import Table

        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=WIDTH)
        table = Table(title=title)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        print(", ".join(f"{key} {value}" for key, value in machine().items()))
    if as_json is None or as_json:
        print(json.dumps({**facts, "machine": machine()}))
