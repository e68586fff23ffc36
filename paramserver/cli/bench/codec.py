"""What encoding, publishing and decoding cost on one thread: time over a memcpy of the same float32 array.

An array is worked on as the exchange does: in blocks of 2^18 elements, each with its own frame. A cell's calls and
the memcpy alternate, and the ratio is that of their medians, so that a drift of the machine's speed cancels out.
Seconds are processor seconds of the one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from pydantic import ValidationError

from paramserver.cli.errors import InputError
from paramserver.encoding import Encoding, EncodingError, EncodingOptions, aligned_zeros, make_encoding
from paramserver.encoding.base import Float32
from paramserver.job import OptimizerSettings
from paramserver.protocol.layout import BLOCK_ELEMENTS
from paramserver.shard.optimizers import Optimizer, make_optimizer

ENCODE = "encode"  # with residual, where the encoding loses something
PUBLISH = "publish"  # encode weights - published values, and move these as every replica moves
DECODE, ADD = "decode", "add"
WORKS = (ENCODE, PUBLISH, DECODE, ADD)
LEAST_SECONDS = 0.02  # of one timed run: calls are repeated until it takes so long


@dataclass(frozen=True)
class Cell:
    """One measured figure; the seconds are those of one pass over the array."""

    encoding: str  # identifier
    work: str  # one of WORKS, or the name of the optimiser whose step follows decoding, in the same pass
    elements: int
    bits: float  # an element, scales included
    seconds: float  # median
    memcpy_seconds: float  # median
    ratios: tuple[float, ...]  # round by round

    @property
    def ratio(self) -> float:
        return self.seconds / self.memcpy_seconds

    @property
    def gigabytes_per_second(self) -> float:
        """Of float32 values."""
        return 4 * self.elements / self.seconds / 1e9


def measure(
    names: Sequence[str],
    tiles: Sequence[int],
    sizes: Sequence[int],
    works: Sequence[str] = WORKS,
    optimizers: Sequence[Mapping[str, Any]] = (),
    rounds: int = 7,
) -> list[Cell]:
    """Time every work of every encoding at every size, in that order from the inside out.

    Args:
        names, tiles: of the encodings; one without tiles is measured once.
        sizes: elements.
        works: some of WORKS.
        optimizers: job sections; their kernels apply the decoded values.

    Raises InputError for an encoding or optimiser that does not exist, before anything is measured.
    """
    encodings = {one.identifier: one for name in names for one in (_encoding(name, tile) for tile in tiles)}
    steps = dict(_optimizer(section) for section in optimizers)
    cells: list[Cell] = []
    for elements in sizes:
        arrays = _Arrays(elements)
        for identifier, encoding in encodings.items():
            case = _Case(encoding, arrays)
            possible = case.runs()
            runs = {work: possible[work] for work in works}
            runs |= {name: case.step(optimizer) for name, optimizer in steps.items()}
            for work, (seconds, copies) in _timed(runs, arrays, rounds).items():
                ratios = tuple(one / other for one, other in zip(seconds, copies, strict=True))
                cells.append(Cell(identifier, work, elements, case.bits, median(seconds), median(copies), ratios))
    return cells


def by_encoding(cells: Sequence[Cell]) -> list[dict[str, Cell]]:
    """The cells of each encoding and size, by work."""
    found: dict[tuple[str, int], dict[str, Cell]] = {}
    for cell in cells:
        found.setdefault((cell.encoding, cell.elements), {})[cell.work] = cell
    return list(found.values())


def _encoding(name: str, tile: int) -> Encoding:
    try:
        return make_encoding(name, EncodingOptions(tile=tile))
    except EncodingError as error:
        raise InputError(str(error)) from None


def _optimizer(section: Mapping[str, Any]) -> tuple[str, Optimizer]:
    """Name and optimiser. Raises InputError."""
    try:
        settings = OptimizerSettings.model_validate(section)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(f"optimizer.{where}: found {problem['input']!r}; {problem['msg']}") from None
    return settings.name, make_optimizer(settings)


class _Arrays:
    """What all cells of a size work on, cut into blocks."""

    def __init__(self, elements: int) -> None:
        self.elements = elements
        generator = np.random.default_rng(0)
        self.values, self.others = (aligned_zeros(elements) for _ in range(2))
        for values in (self.values, self.others):
            generator.standard_normal(out=values, dtype=np.float32)
        self.residual, self.published = (aligned_zeros(elements, place=1) for _ in range(2))
        self.weights, self.target = aligned_zeros(elements), aligned_zeros(elements)

    def copy(self) -> None:
        np.copyto(self.target, self.values)


def _blocks(array: Float32) -> list[Float32]:
    return [array[start : start + BLOCK_ELEMENTS] for start in range(0, array.size, BLOCK_ELEMENTS)]


class _Case:
    """One encoding with the frames of all blocks; each of its runs goes over the whole array once."""

    def __init__(self, encoding: Encoding, arrays: _Arrays) -> None:
        self._encoding = encoding
        self._values = _blocks(arrays.values)
        # What is published twice would have no delta any more, so two sets of values are published in turn.
        self._turns = [self._values, _blocks(arrays.others)]
        arrays.residual[:] = arrays.published[:] = 0
        # As the exchange does it: a lossless encoding has nothing to remember.
        residuals = _blocks(arrays.residual)
        self._residuals = [None] * len(residuals) if encoding.lossless else residuals
        self._published, self._weights = _blocks(arrays.published), _blocks(arrays.weights)
        self._frames = [np.zeros(encoding.frame_bytes(block.size), np.uint8) for block in self._weights]
        self._scratch = np.empty(min(arrays.elements, BLOCK_ELEMENTS), np.float32)
        # Of the values alone, whatever the encoder goes on to send; read-only, as a transport hands frames out.
        self._received = []
        for block, frame in zip(self._values, self._frames, strict=True):
            taken = encoding.encode(block, frame)
            self._received.append(np.frombuffer(frame[:taken].tobytes(), np.uint8))
        self.bits = 8 * sum(frame.size for frame in self._received) / arrays.elements

    def runs(self) -> dict[str, Callable[[], None]]:
        return {ENCODE: self._encode, PUBLISH: self._publish, DECODE: self._decode, ADD: self._add}

    def step(self, optimizer: Optimizer) -> Callable[[], None]:
        states = [optimizer.state(block.size) for block in self._weights]

        def run() -> None:
            for frame, weights, state in zip(self._received, self._weights, states, strict=True):
                optimizer.apply(weights, state, 1, self._encoding, frame)

        return run

    def _encode(self) -> None:
        for block, frame, residual in zip(self._values, self._frames, self._residuals, strict=True):
            self._encoding.encode(block, frame, residual)

    def _publish(self) -> None:
        self._turns.reverse()
        for block, published, frame in zip(self._turns[0], self._published, self._frames, strict=True):
            self._encoding.encode_delta(block, published, frame, self._scratch[: block.size])

    def _decode(self) -> None:
        for frame, out in zip(self._received, self._weights, strict=True):
            self._encoding.decode(frame, out)

    def _add(self) -> None:
        for frame, out in zip(self._received, self._weights, strict=True):
            self._encoding.decode_add(frame, out)


def _timed(
    runs: Mapping[str, Callable[[], None]], arrays: _Arrays, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each work and of the memcpy beside it, by round."""
    copies = _repeats(arrays.copy)
    repeats = {work: _repeats(run) for work, run in runs.items()}
    found: dict[str, tuple[list[float], list[float]]] = {work: ([], []) for work in runs}
    for _ in range(rounds):
        for work, run in runs.items():
            found[work][1].append(_seconds(arrays.copy, copies))
            found[work][0].append(_seconds(run, repeats[work]))
    return found


def _repeats(run: Callable[[], None]) -> int:
    run()  # compiles, or loads from the disk cache
    return max(1, round(LEAST_SECONDS / max(_seconds(run, 1), 1e-7)))


def _seconds(run: Callable[[], None], repeats: int) -> float:
    """Of one run and this thread alone: what another process takes of the core meanwhile is no cost of the codec."""
    run()  # brings the arrays back into the caches that they fit into
    started = time.thread_time()
    for _ in range(repeats):
        run()
    return (time.thread_time() - started) / repeats
