"""The scales of a chunk's tiles: docs/encodings.md, "Rounding, written out".

Each `scales_` function first adds values[at : at + count] to totals[first : first + count], tile by tile while
both are near, then turns what it measured into scales[0 : tiles]: bfloat16 values held in float32. `whole` is
whether all tiles are whole; then `tile` and `count` may be constants.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding.compiled import inlined, kernel
from paramserver.encoding.memory.kernels import INFINITY, MAGNITUDE, WIDTH, load, reinterpret
from paramserver.encoding.sums.kernels import (
    NO_LIMIT,
    TILES,
    add_and_sum,
    add_and_sum_tiles,
    sum_above,
    sum_above_tiles,
)

_UPPER = np.uint32(0xFFFF0000)
_TAIL = np.uint32(0xFFFF)
_SMALLEST = np.uint32(1 << 23)  # 2**-126: its inverse is finite
_LARGEST = np.uint32(247 << 23)  # 2**120: times every code it is finite
_LARGEST_MEAN = np.float32(2.0**120)
_NAN = np.float32(np.nan)


@inlined
def _members(tile, whole, count, k):
    return tile if whole else min(tile, count - k * tile)


# -------------------------------------------------------------------------- from largest magnitudes


@inlined
def scale_of_largest(largest, limit):
    """The bits of the scale with which the largest magnitude, given by its bits, gets the code `limit`: rounded up."""
    bits = reinterpret(reinterpret(largest, np.float32) / limit, np.uint32)
    bits = np.uint32(np.uint32(bits + _TAIL) & _UPPER)
    bits = np.uint32(min(max(bits, _SMALLEST), _LARGEST))
    bits = np.uint32(0) if largest == np.uint32(0) else bits
    return INFINITY if largest >= INFINITY else bits


@inlined
def largest_bits(totals, first, count):
    """The largest magnitude's bits. Magnitudes order as their bits, and a maximum of integers is fast."""
    largest = np.uint32(0)
    for i in range(count):
        largest = max(largest, np.uint32(reinterpret(totals[np.uintp(first + i)], np.uint32) & MAGNITUDE))
    return largest


@inlined
def _add(values, at, totals, first, count):
    """Add the values; returns the largest magnitude's bits."""
    largest = np.uint32(0)
    for i in range(count):
        total = values[np.uintp(at + i)] + totals[np.uintp(first + i)]
        totals[np.uintp(first + i)] = total
        largest = max(largest, np.uint32(reinterpret(total, np.uint32) & MAGNITUDE))
    return largest


@inlined
def _scales_of_largest(limit, tile, whole, values, at, totals, first, count, scales):
    tiles = (count + tile - 1) // tile
    for k in range(tiles):
        offset = k * tile
        largest = _add(values, at + offset, totals, first + offset, _members(tile, whole, count, k))
        scales[k] = reinterpret(largest, np.float32)
    # Divisions take long: in a loop of their own vectors are divided.
    for k in range(tiles):
        scales[k] = reinterpret(scale_of_largest(reinterpret(scales[k], np.uint32), limit), np.float32)


@inlined
def scales_127(tile, whole, values, at, totals, first, count, scales):
    _scales_of_largest(np.float32(127), tile, whole, values, at, totals, first, count, scales)


@inlined
def scales_7(tile, whole, values, at, totals, first, count, scales):
    _scales_of_largest(np.float32(7), tile, whole, values, at, totals, first, count, scales)


@inlined
def scales_6(tile, whole, values, at, totals, first, count, scales):
    _scales_of_largest(np.float32(6), tile, whole, values, at, totals, first, count, scales)


@inlined
def _add_signed(values, at, totals, first, count):
    """As _add, with the magnitude's bits one place up and the lowest bit set where the value is positive."""
    largest = np.uint32(0)
    for i in range(count):
        total = values[np.uintp(at + i)] + totals[np.uintp(first + i)]
        totals[np.uintp(first + i)] = total
        bits = reinterpret(total, np.uint32)
        # So a positive value wins over a negative one of equal magnitude.
        turned = np.uint32(np.uint32(bits << np.uint32(1)) | np.uint32(np.uint32(~bits) >> np.uint32(31)))
        largest = max(largest, turned)
    return largest


@inlined
def scales_2_signed(tile, whole, values, at, totals, first, count, scales):
    """Minus half of the value of largest magnitude, the magnitude rounded up."""
    tiles = (count + tile - 1) // tile
    for k in range(tiles):
        offset = k * tile
        largest = _add_signed(values, at + offset, totals, first + offset, _members(tile, whole, count, k))
        scales[k] = reinterpret(largest, np.float32)
    for k in range(tiles):
        turned = reinterpret(scales[k], np.uint32)
        scale = scale_of_largest(np.uint32(turned >> np.uint32(1)), np.float32(2))
        sign = np.uint32(np.uint32(turned & np.uint32(1)) << np.uint32(31))
        sign = np.uint32(0) if scale == np.uint32(0) else sign
        scales[k] = reinterpret(np.uint32(scale | sign), np.float32)


# -------------------------------------------------------------------------------------- from means


@inlined
def _mean(total, count):
    """The mean magnitude; a sum that overflows gives the largest mean, NaN stays."""
    mean = np.float32(total / np.float32(count))
    return _LARGEST_MEAN if mean > _LARGEST_MEAN else mean


@inlined
def _scale_of_mean(mean):
    """The scale that a mean of magnitudes becomes: rounded to nearest, half to even. NaN gives infinity."""
    bits = reinterpret(mean, np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) & _UPPER)
    rounded = np.uint32(min(max(rounded, _SMALLEST), _LARGEST))
    rounded = np.uint32(0) if bits == np.uint32(0) else rounded
    return reinterpret(np.uint32(rounded if mean == mean else INFINITY), np.float32)


@inlined
def _sum_of_tile(totals, first, count, limit):
    if count % WIDTH == 0:
        return sum_above(totals, first, count // WIDTH, limit)
    # A short tile counts as filled up with zeros: lanes beyond it add nothing.
    lanes = np.zeros(WIDTH, np.float32)
    for i in range(count):
        magnitude = np.abs(totals[np.uintp(first + i)])
        lanes[i % WIDTH] += np.float32(0) if magnitude <= limit else magnitude
    return sum_above(lanes, 0, 1, NO_LIMIT)


@inlined
def _add_and_sum(tile, whole, values, at, totals, first, count, sums):
    """Add the values; sums[k] is the sum of tile k's magnitudes, NaN where it holds NaN or infinity."""
    tiles = (count + tile - 1) // tile
    if whole and tile == WIDTH and tiles % TILES == 0:
        for k in range(0, tiles, TILES):
            add_and_sum_tiles(values, at + k * WIDTH, totals, first + k * WIDTH, sums, k)
    else:
        for k in range(tiles):
            offset, members = k * tile, _members(tile, whole, count, k)
            if members % WIDTH == 0:
                sums[k] = add_and_sum(values, at + offset, totals, first + offset, members // WIDTH)
            else:
                _add(values, at + offset, totals, first + offset, members)
                sums[k] = _sum_of_tile(totals, first + offset, members, NO_LIMIT)
    for k in range(tiles):
        # Finite values may have an infinite sum.
        is_finite = reinterpret(sums[k], np.uint32) < INFINITY
        if not is_finite and largest_bits(totals, first + k * tile, _members(tile, whole, count, k)) >= INFINITY:
            sums[k] = _NAN


@inlined
def scales_mean(tile, whole, values, at, totals, first, count, scales):
    """The mean magnitude."""
    _add_and_sum(tile, whole, values, at, totals, first, count, scales)
    for k in range((count + tile - 1) // tile):
        scales[k] = _scale_of_mean(_mean(scales[k], _members(tile, whole, count, k)))


@inlined
def scales_mean_of_large(tile, whole, values, at, totals, first, count, scales):
    """The mean of the magnitudes that are above 3/4 of the mean magnitude."""
    tiles = (count + tile - 1) // tile
    limits, counts = np.empty(tiles, np.float32), np.empty(tiles, np.int32)
    _add_and_sum(tile, whole, values, at, totals, first, count, scales)
    for k in range(tiles):
        limits[k] = np.float32(0.75) * _mean(scales[k], _members(tile, whole, count, k))
    for k in range(tiles):
        large = np.int32(0)
        for i in range(_members(tile, whole, count, k)):
            large += np.int32(np.abs(totals[np.uintp(first + k * tile + i)]) > limits[k])
        counts[k] = max(large, np.int32(1))
    if whole and tile == WIDTH and tiles % TILES == 0:
        for k in range(0, tiles, TILES):
            sum_above_tiles(totals, first + k * WIDTH, limits, scales, k)
    else:
        for k in range(tiles):
            scales[k] = _sum_of_tile(totals, first + k * tile, _members(tile, whole, count, k), limits[k])
    for k in range(tiles):
        # The limit still knows of a tile that holds NaN or infinity.
        mean = _mean(scales[k], counts[k])
        scales[k] = _scale_of_mean(mean if limits[k] == limits[k] else _NAN)


@kernel
def are_scales(frame, start, count, is_signed):
    """Whether the `count` bfloat16 from byte `start` on are scales that an encoder writes."""
    wrong = 0
    sign = np.uint16(0x7FFF) if is_signed else np.uint16(0xFFFF)
    for i in range(count):
        bits = np.uint16(load(frame, start + 2 * i, np.uint16))
        # Less one, zero is the largest; a sign that may not be makes the number too large.
        magnitude = np.uint16(bits & sign)
        is_scale = magnitude >= np.uint16(0x0080) and magnitude <= np.uint16(0x7B80)
        wrong += 0 if is_scale or bits == np.uint16(0) else 1
    return wrong == 0
