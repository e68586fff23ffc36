"""What encoding and decoding cost on one thread: time over a memcpy of the same float32 array.

An array is worked on as the exchange does: in blocks of 2^18 elements, each with its own frame. A cell's calls and
the memcpy alternate, and the ratio is that of their medians. Seconds are processor seconds of the one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.options import make_parser, rounds_of
from benchmarks.report import median, show, spread
from paramserver.encoding import Encoding, EncodingOptions, aligned_zeros, make_encoding
from paramserver.encoding.base import Float32
from paramserver.job import OptimizerSettings
from paramserver.shard.optimizers import Optimizer, make_optimizer

BLOCK = 2**18
SIZES = (2**20, 2**24)
NAMES = ("fp32", "bf16", "int8", "int4", "fp4", "int2", "ternary", "sign", "topk")
TILES = (64, 2048)
WORKS = ("encode", "decode", "add")
OPTIMIZERS = ("momentum", "adagrad")  # after decoding, in the same pass
MIN_ELEMENTS = 2**22  # a timing covers so many at least, by repetition


@dataclass(frozen=True)
class Cell:
    """One measured figure; the seconds are those of one pass over the array."""

    encoding: str  # identifier
    work: str  # "encode", "decode", "add", or the optimiser that follows decoding
    elements: int
    bits: float  # an element, scales included
    seconds: float  # median
    memcpy_seconds: float  # median
    ratios: tuple[float, ...]  # round by round

    @property
    def ratio(self) -> float:
        return self.seconds / self.memcpy_seconds


class _Arrays:
    """What all cells of a size work on, cut into blocks."""

    def __init__(self, elements: int) -> None:
        generator = np.random.default_rng(0)
        self.elements = elements
        self.values, self.residual, self.weights = (aligned_zeros(elements, place) for place in (0, 1, 0))
        generator.standard_normal(out=self.values, dtype=np.float32)
        self.copy = aligned_zeros(elements)

    def blocks(self, array: Float32) -> list[Float32]:
        return [array[start : start + BLOCK] for start in range(0, self.elements, BLOCK)]


def _works(
    encoding: Encoding, arrays: _Arrays, optimizers: Sequence[str]
) -> tuple[dict[str, Callable[[], None]], float]:
    """What is timed, by name: each works on the whole array; and the bits an element."""
    values, residuals, outs = (arrays.blocks(array) for array in (arrays.values, arrays.residual, arrays.weights))
    frames = [np.zeros(encoding.frame_bytes(block.size), np.uint8) for block in values]
    for block, frame in zip(values, frames, strict=True):
        encoding.encode(block, frame)
    # Of the values alone, whatever the encoder goes on to send; read-only, as a transport hands frames out.
    received = [np.frombuffer(frame.tobytes(), np.uint8) for frame in frames]

    def encode() -> None:
        for block, frame, residual in zip(values, frames, residuals, strict=True):
            encoding.encode(block, frame, residual)

    def decode() -> None:
        for frame, out in zip(received, outs, strict=True):
            encoding.decode(frame, out)

    def add() -> None:
        for frame, out in zip(received, outs, strict=True):
            encoding.decode_add(frame, out)

    def step(optimizer: Optimizer) -> Callable[[], None]:
        states = [optimizer.state(block.size) for block in values]

        def run() -> None:
            for frame, out, state in zip(received, outs, states, strict=True):
                optimizer.apply(out, state, 1, encoding, frame)

        return run

    works = {"encode": encode, "decode": decode, "add": add}
    for name in optimizers:
        works[name] = step(make_optimizer(OptimizerSettings.model_validate({"name": name, "lr": 1e-6})))
    return works, 8 * sum(frame.size for frame in frames) / arrays.elements


def measure(
    names: Sequence[str] = NAMES,
    tiles: Sequence[int] = TILES,
    sizes: Sequence[int] = SIZES,
    optimizers: Sequence[str] = OPTIMIZERS,
    rounds: int = 9,
) -> list[Cell]:
    """Every work of every encoding at every size."""
    cells: list[Cell] = []
    for elements in sizes:
        arrays = _Arrays(elements)
        encodings = {
            encoding.identifier: encoding
            for name in names
            for encoding in (make_encoding(name, EncodingOptions(tile=tile)) for tile in tiles)
        }
        for identifier, encoding in encodings.items():
            arrays.residual[:] = 0
            works, bits = _works(encoding, arrays, optimizers)
            for work, (seconds, copies) in _timed(works, arrays, rounds).items():
                ratios = tuple(one / other for one, other in zip(seconds, copies, strict=True))
                cells.append(Cell(identifier, work, elements, bits, median(seconds), median(copies), ratios))
    return cells


def _timed(
    works: dict[str, Callable[[], None]], arrays: _Arrays, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each work and of the memcpy beside it, by round. The first round, which compiles, does not count."""
    repetitions = max(1, MIN_ELEMENTS // arrays.elements)
    found: dict[str, tuple[list[float], list[float]]] = {work: ([], []) for work in works}
    for number in range(rounds + 1):
        for work, call in works.items():
            copied = _seconds(lambda: np.copyto(arrays.copy, arrays.values), repetitions)
            worked = _seconds(call, repetitions)
            if number:
                found[work][0].append(worked)
                found[work][1].append(copied)
    return found


def _seconds(call: Callable[[], None], repetitions: int) -> float:
    """Of this thread alone: what another process takes of the core meanwhile is no cost of the codec."""
    call()  # brings the arrays back into the caches that they fit into
    start = time.thread_time()
    for _ in range(repetitions):
        call()
    return (time.thread_time() - start) / repetitions


def run(
    names: Sequence[str] = NAMES, tiles: Sequence[int] = TILES, sizes: Sequence[int] = SIZES, rounds: int = 9
) -> None:
    cells = measure(names, tiles, sizes, rounds=rounds)
    works = list(dict.fromkeys(cell.work for cell in cells))
    by_place = {(cell.encoding, cell.elements, cell.work): cell for cell in cells}
    rows = []
    for identifier, elements in dict.fromkeys((cell.encoding, cell.elements) for cell in cells):
        row = [by_place[identifier, elements, work] for work in works]
        rows.append([identifier, f"{row[0].bits:.3g}", _millions(elements), *(f"{cell.ratio:.2f}" for cell in row)])
    copies = ", ".join(
        f"{_millions(size)} {spread([1e3 * cell.memcpy_seconds for cell in cells if cell.elements == size])} ms"
        for size in sizes
    )
    columns = ["encoding", "bits", "size", *(work if work in WORKS else f"+ {work}" for work in works)]
    facts = [{**asdict(cell), "ratio": cell.ratio} for cell in cells]
    title = f"one thread: time over a memcpy of the same float32 array ({copies}), {rounds} rounds"
    show(title, columns, rows, {"benchmark": "codec", "rounds": rounds, "cells": facts})


def _millions(elements: int) -> str:
    return f"{elements / 2**20:.3g}M"


def main(arguments: Sequence[str]) -> None:
    given = make_parser("codec", __doc__, rounds=9).parse_args(arguments)
    run(rounds=rounds_of(given))
