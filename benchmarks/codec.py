"""What encoding, publishing, decoding and applying cost on one thread: time over a memcpy of the same float32 array.

`paramserver bench codec` measures the same, of fewer works and one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.options import make_parser, rounds_of
from benchmarks.report import show, spread
from paramserver.cli.bench import codec

SIZES = (2**20, 2**24)
NAMES = ("fp32", "bf16", "int8", "int4", "fp4", "int2", "ternary", "sign", "topk")
TILES = (64, 2048)
OPTIMIZERS = ("momentum", "adagrad")


def run(
    names: Sequence[str] = NAMES, tiles: Sequence[int] = TILES, sizes: Sequence[int] = SIZES, rounds: int = 9
) -> None:
    """Print the table of ratios."""
    sections = [{"name": name, "lr": 1e-6} for name in OPTIMIZERS]
    cells = codec.measure(names, tiles, sizes, optimizers=sections, rounds=rounds)
    rows = []
    for row in codec.by_encoding(cells):
        first = row[codec.ENCODE]
        ratios = [f"{cell.ratio:.2f}" for cell in row.values()]
        rows.append([first.encoding, f"{first.bits:.3g}", _millions(first.elements), *ratios])
    copies = ", ".join(
        f"{_millions(size)} {spread([1e3 * cell.memcpy_seconds for cell in cells if cell.elements == size])} ms"
        for size in sizes
    )
    columns = ["encoding", "bits", "size", *codec.WORKS, *(f"+ {name}" for name in OPTIMIZERS)]
    facts = [{**asdict(cell), "ratio": cell.ratio} for cell in cells]
    title = f"one thread: time over a memcpy of the same float32 array ({copies}), {rounds} rounds"
    show(title, columns, rows, {"benchmark": "codec", "rounds": rounds, "cells": facts})


def _millions(elements: int) -> str:
    return f"{elements / 2**20:.3g}M"


def main(arguments: Sequence[str]) -> None:
    given = make_parser("codec", __doc__, rounds=9).parse_args(arguments)
    run(rounds=rounds_of(given))
