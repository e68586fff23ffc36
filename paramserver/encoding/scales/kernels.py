"""The scale of a tile: docs/encodings.md, "Rounding, written out".

A scale is a bfloat16 held in a float32. Each function takes the tile as totals[first : first + count], of
which the last multiple of 64 is filled up with zeros, and returns the scale's bits as a float32 has them.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding.compiled import inlined, kernel
from paramserver.encoding.memory.kernels import INFINITY, MAGNITUDE, WIDTH, load, reinterpret, sum_of_lanes

_UPPER = np.uint32(0xFFFF0000)
_TAIL = np.uint32(0xFFFF)
SMALLEST_BITS = np.uint32(1 << 23)  # 2**-126: its inverse is finite
LARGEST_BITS = np.uint32(247 << 23)  # 2**120: times every code it is finite
_LARGEST = np.float32(2.0**120)
_ALL = np.float32(-1)  # every magnitude is above it


@inlined
def scale_of_largest(largest, limit):
    """The scale where the largest magnitude, given by its bits, shall get the code `limit`: rounded up."""
    bits = reinterpret(reinterpret(largest, np.float32) / limit, np.uint32)
    bits = np.uint32(np.uint32(bits + _TAIL) & _UPPER)
    bits = np.uint32(min(max(bits, SMALLEST_BITS), LARGEST_BITS))
    bits = np.uint32(0) if largest == np.uint32(0) else bits
    return INFINITY if largest >= INFINITY else bits


@inlined
def _scale_of_mean(mean):
    """The scale that a mean of magnitudes becomes: rounded to nearest, half to even."""
    bits = reinterpret(mean, np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) & _UPPER)
    rounded = np.uint32(min(max(rounded, SMALLEST_BITS), LARGEST_BITS))
    return np.uint32(0) if bits == np.uint32(0) else rounded


@inlined
def largest_bits(totals, first, count):
    """The largest magnitude's bits. Magnitudes order as their bits, and a maximum of integers is fast."""
    largest = np.uint32(0)
    for i in range(count):
        bits = np.uint32(reinterpret(totals[np.uintp(first + i)], np.uint32) & MAGNITUDE)
        largest = max(largest, bits)
    return largest


@inlined
def scale_127(tile, totals, first, count, lanes):
    return scale_of_largest(largest_bits(totals, first, count), np.float32(127))


@inlined
def scale_7(tile, totals, first, count, lanes):
    return scale_of_largest(largest_bits(totals, first, count), np.float32(7))


@inlined
def scale_6(tile, totals, first, count, lanes):
    return scale_of_largest(largest_bits(totals, first, count), np.float32(6))


@inlined
def scale_2_signed(tile, totals, first, count, lanes):
    """Minus half of the value of largest magnitude, its magnitude rounded up."""
    largest = np.uint32(0)
    for i in range(count):
        bits = reinterpret(totals[np.uintp(first + i)], np.uint32)
        # The sign goes to the lowest place, where a positive value wins over a negative one of equal magnitude.
        turned = np.uint32(np.uint32(bits << np.uint32(1)) | np.uint32(np.uint32(~bits) >> np.uint32(31)))
        largest = max(largest, turned)
    magnitude = np.uint32(largest >> np.uint32(1))
    scale = scale_of_largest(magnitude, np.float32(2))
    sign = np.uint32(np.uint32(largest & np.uint32(1)) << np.uint32(31))
    sign = np.uint32(0) if scale == np.uint32(0) else sign
    return np.uint32(scale | sign)


@inlined
def _sum(tile, totals, first, count, above, lanes):
    """The sum of the magnitudes above a limit, in the written order."""
    if tile == WIDTH:
        return sum_of_lanes(totals, first, above)
    if tile > WIDTH:
        lanes[:WIDTH] = np.float32(0)
        for start in range(first, first + count, WIDTH):
            for lane in range(WIDTH):
                magnitude = np.abs(totals[np.uintp(start + lane)])
                lanes[np.uintp(lane)] += magnitude if magnitude > above else np.float32(0)
        return sum_of_lanes(lanes, 0, _ALL)
    lanes[:WIDTH] = np.float32(0)
    for lane in range(count):
        magnitude = np.abs(totals[first + lane])
        lanes[lane] = magnitude if magnitude > above else np.float32(0)
    # Lanes beyond the tile are zero, and adding zero changes nothing.
    return sum_of_lanes(lanes, 0, _ALL)


@inlined
def _mean(total, count):
    return min(np.float32(total / np.float32(count)), _LARGEST)


@inlined
def scale_mean(tile, totals, first, count, lanes):
    """The mean magnitude."""
    total = _sum(tile, totals, first, count, _ALL, lanes)
    if reinterpret(total, np.uint32) >= INFINITY and largest_bits(totals, first, count) >= INFINITY:
        return INFINITY
    return _scale_of_mean(_mean(total, count))


@inlined
def scale_mean_of_large(tile, totals, first, count, lanes):
    """The mean of the magnitudes that are above 3/4 of the mean magnitude."""
    total = _sum(tile, totals, first, count, _ALL, lanes)
    if reinterpret(total, np.uint32) >= INFINITY and largest_bits(totals, first, count) >= INFINITY:
        return INFINITY
    above = np.float32(0.75) * _mean(total, count)
    large = np.int32(0)
    for i in range(count):
        large += np.int32(np.abs(totals[np.uintp(first + i)]) > above)
    total = _sum(tile, totals, first, count, above, lanes)
    return _scale_of_mean(_mean(total, max(large, np.int32(1))))


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
