"""Encodings on one thread: encode with residual, and decode + apply, as times over a memcpy of the same float32 array.

A memcpy is measured beside every encoding, in the same rounds, so that a drift of the machine's speed cancels out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from paramserver.cli.errors import InputError

LEAST_SECONDS = 0.02  # of one timed run: calls are repeated until it takes so long
ENCODE, APPLY, COPY = "encode", "decode+apply", "memcpy"


@dataclass(frozen=True)
class CodecFigures:
    """One encoding at one size: medians over the rounds."""

    identifier: str
    elements: int
    bits: float  # an element, on the wire
    memcpy_seconds: float
    encode_over_memcpy: float
    apply_over_memcpy: float

    @property
    def encode_gigabytes_per_second(self) -> float:
        """Of float32 values."""
        return 4 * self.elements / (self.encode_over_memcpy * self.memcpy_seconds) / 1e9


def measure(
    names: Sequence[str], tile: int, elements: int, optimizer: Mapping[str, Any], rounds: int
) -> list[CodecFigures]:
    """Time these encodings in turn, round after round.

    Args:
        optimizer: the job's section; its kernel applies the decoded values.

    Raises InputError for an encoding or optimiser that does not exist.
    """
    cases = [_Case(name, tile, elements, optimizer) for name in names]
    found = []
    for case in cases:
        runs = {ENCODE: case.encode, APPLY: case.apply, COPY: case.copy}
        repeats = {what: _repeats(run) for what, run in runs.items()}
        seconds: dict[str, list[float]] = {what: [] for what in runs}
        for _ in range(rounds):
            for what, run in runs.items():
                seconds[what].append(_timed(run, repeats[what]))
        middle = {what: median(times) for what, times in seconds.items()}
        found.append(
            CodecFigures(
                identifier=case.encoding.identifier,
                elements=elements,
                bits=8 * case.size / elements,
                memcpy_seconds=middle[COPY],
                encode_over_memcpy=middle[ENCODE] / middle[COPY],
                apply_over_memcpy=middle[APPLY] / middle[COPY],
            )
        )
    return found


class _Case:
    """One encoding with the arrays that it works on; each run does its work once."""

    def __init__(self, name: str, tile: int, elements: int, optimizer: Mapping[str, Any]) -> None:
        import numpy as np
        from pydantic import ValidationError

        from paramserver.encoding import EncodingError, EncodingOptions, make_encoding
        from paramserver.job import OptimizerSettings
        from paramserver.shard.optimizers import make_optimizer

        try:
            self.encoding = make_encoding(name, EncodingOptions(tile=tile))
            self._optimizer = make_optimizer(OptimizerSettings.model_validate(optimizer))
        except EncodingError as error:
            raise InputError(str(error)) from None
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise InputError(f"optimizer.{where}: found {problem['input']!r}; {problem['msg']}") from None
        self._values = np.random.default_rng(0).normal(0, 1e-3, elements).astype(np.float32)
        self._copy = np.zeros_like(self._values)
        # As the exchange does it: a lossless encoding has nothing to remember.
        self._residual = None if self.encoding.lossless else np.zeros_like(self._values)
        self._frame = np.zeros(self.encoding.frame_bytes(elements), np.uint8)
        self._weights, self._state = np.zeros_like(self._values), self._optimizer.state(elements)
        self.size = 0
        self.encode()

    def copy(self) -> None:
        self._copy[:] = self._values

    def encode(self) -> None:
        self.size = self.encoding.encode(self._values, self._frame, self._residual)

    def apply(self) -> None:
        self._optimizer.apply(self._weights, self._state, 1, self.encoding, self._frame[: self.size])


def _repeats(run: Callable[[], None]) -> int:
    run()  # compiles, or loads from the disk cache
    taken = _timed(run, 1)
    return max(1, round(LEAST_SECONDS / max(taken, 1e-7)))


def _timed(run: Callable[[], None], repeats: int) -> float:
    """Seconds of one run."""
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - started) / repeats
