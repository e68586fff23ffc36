"""The fixed probability tables of `coded`: who knows the class of a segment knows its table, so none is sent.

A class is an assumption about the codes of a segment: how many are not zero, and how fast larger ones thin out.
All of it is integer arithmetic, so that every machine has the same tables. They are part of the wire format.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from paramserver.encoding.coded.constants import (
    ESCAPE,
    EXCESSES,
    PAIR_LARGEST,
    PAIR_SIDE,
    PROBABILITY_BITS,
    RAW,
    SHARES,
    SINGLE_LARGEST,
    SPREADS,
    SYMBOLS,
    pair_class,
    single_class,
)

_ONE = 1 << 16  # shares and ratios are 65536ths
_TOTAL = 1 << PROBABILITY_BITS
_INVERSE_BITS = 43


class Tables(NamedTuple):
    """What the kernels look up; read-only."""

    slots: npt.NDArray[np.uint32]  # (classes, 4096): symbol | slot - first slot of the symbol << 8 | frequency << 20
    marks: npt.NDArray[np.uint32]  # (classes, symbols): frequency << 12 | first slot; 0 where a symbol is left out
    inverses: npt.NDArray[np.uint64]  # (classes, symbols): ceil(2^43 / frequency)
    share_limits: npt.NDArray[np.int64]  # between neighbouring shares of codes that are not zero, in 65536ths
    excess_limits: npt.NDArray[np.int64]  # the same of the excess ratio
    spread_limits: npt.NDArray[np.int64]  # the same of 256 x the mean magnitude


@cache
def tables() -> Tables:
    """All tables, made once a process in a few hundredths of a second. Read-only; any thread."""
    weights: dict[int, list[int]] = {RAW: [1] * 256}
    for share_index, share in enumerate(SHARES):
        for excess_index, excess in enumerate(EXCESSES):
            weights[pair_class(share_index, excess_index)] = _pair_weights(share, excess)
    means: list[int] = []
    for index, ratio in enumerate(SPREADS):
        digits = [_ONE ** (SINGLE_LARGEST - abs(code)) * ratio ** abs(code) for code in _codes(SINGLE_LARGEST)]
        # What lies beyond the largest: two geometric tails.
        tail = 2 * ratio ** (SINGLE_LARGEST + 1) // (_ONE - ratio)
        weights[single_class(index)] = [*digits, tail]
        total = sum(abs(code) * weight for code, weight in zip(_codes(SINGLE_LARGEST), digits, strict=True))
        means.append(256 * total // sum(digits))
    slots = np.zeros((RAW + 1, _TOTAL), np.uint32)
    marks, inverses = np.zeros((RAW + 1, 256), np.uint32), np.zeros((RAW + 1, 256), np.uint64)
    for index, row in weights.items():
        _fill(frequencies(row), slots[index], marks[index], inverses[index])
    made = Tables(slots, marks, inverses, _between(SHARES), _between(EXCESSES), _between(means))
    for array in made:
        array.flags.writeable = False
    return made


def _codes(largest: int) -> range:
    return range(-largest, largest + 1)


def _pair_weights(share: int, excess: int) -> list[int]:
    """Weights of the pairs (first, second), then of the escape, for independent codes.

    A code is zero with probability 1 - share, and k or -k with share (1 - excess) excess^(k - 1) / 2 each.
    """
    one = {0: 2 * (_ONE - share) * _ONE**PAIR_LARGEST}
    for k in range(1, PAIR_LARGEST + 1):
        one[k] = one[-k] = share * (_ONE - excess) * excess ** (k - 1) * _ONE ** (PAIR_LARGEST - k)
    whole = 2 * _ONE ** (PAIR_LARGEST + 1)
    codes = _codes(PAIR_LARGEST)
    pairs = [one[first] * one[second] for first in codes for second in codes]
    return [*pairs, whole * whole - sum(pairs)]


def frequencies(weights: Sequence[int]) -> list[int]:
    """Slots of 4,096 for each symbol, by weight, half up. One that deserves less than half a slot is left out.

    The last symbol of 82 is the escape, which those left out need: it has a slot always. What rounding gave too
    much or too little, the heaviest symbol, of equals the first, makes good.
    """
    whole = sum(weights)
    found = [(2 * _TOTAL * weight + whole) // (2 * whole) for weight in weights]
    if len(found) == SYMBOLS:
        found[ESCAPE] = max(1, found[ESCAPE])
    heaviest = weights.index(max(weights))
    found[heaviest] += _TOTAL - sum(found)
    return found


def _fill(
    row: Sequence[int],
    slots: npt.NDArray[np.uint32],
    marks: npt.NDArray[np.uint32],
    inverses: npt.NDArray[np.uint64],
) -> None:
    count = np.array(row, np.int64)
    first = np.cumsum(count) - count
    symbols = np.repeat(np.arange(count.size), count)  # (4096,)
    slots[:] = symbols | (np.arange(_TOTAL) - first[symbols]) << 8 | count[symbols] << 20
    used = np.flatnonzero(count)
    marks[used] = count[used] << PROBABILITY_BITS | first[used]
    inverses[used] = -(-(1 << _INVERSE_BITS) // count[used])


def _between(levels: Sequence[int]) -> npt.NDArray[np.int64]:
    """The rounded means of neighbouring levels: which level is nearest is decided in integers."""
    return np.array([(low + high) // 2 for low, high in pairwise(levels)], np.int64)


assert PAIR_SIDE**2 == ESCAPE == 2 * SINGLE_LARGEST + 1
