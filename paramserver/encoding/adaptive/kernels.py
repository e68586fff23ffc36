"""Compiled kernels of `adaptive`: what each level would lose, and frames whose segments are frames of other members.

Scales, codes and packing are those of the members; here is only which segment gets which, and where it lies.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding import kernels as family
from paramserver.encoding.adaptive.constants import INT4, INT8, LEVELS, SEGMENT, SIGN, SKIP, TERNARY
from paramserver.encoding.compiled import inlined, kernel
from paramserver.encoding.memory import kernels as memory
from paramserver.encoding.memory.kernels import MAGNITUDE, WIDTH, load, reinterpret, store
from paramserver.encoding.packing.kernels import largest_byte
from paramserver.encoding.scales.kernels import are_scales
from paramserver.encoding.sums.kernels import NO_LIMIT, sum_above
from paramserver.encoding.tiled.kernels import encode_int4, encode_int8, encode_sign, encode_ternary

ADAPTIVE = 9  # Encoding.kind

# A plain 0 or False would be a type of its own, for which callees are compiled once more.
_NO_SEED, _UNSIGNED = np.int64(0), np.bool_(False)
_TRITS = 243  # a byte of five trits is less


@kernel
def segment_bytes(level, count, tile):
    """What a segment of `count` elements takes at a level, its level byte not counted."""
    if level == SIGN:
        codes = (count + 7) // 8
    elif level == TERNARY:
        codes = (count + 4) // 5
    elif level == INT4:
        codes = (count + 1) // 2
    elif level == INT8:
        codes = count
    else:
        return 0
    return 2 * ((count + tile - 1) // tile) + codes


# -------------------------------------------------------------------------------- what is lost


@inlined
def _energy(totals, count):
    """The sum of squares of totals[:count], of which the last multiple of WIDTH is filled up with zeros."""
    lanes = np.zeros(WIDTH, np.float64)
    for start in range(0, count, WIDTH):
        for lane in range(WIDTH):
            value = np.float64(totals[np.uintp(start + lane)])
            lanes[lane] += value * value
    return lanes.sum()


@inlined
def _sum_above(tile, totals, first, count, above):
    if tile == WIDTH:
        return np.float64(sum_above(totals, first, 1, above))
    total = np.float64(0)
    for i in range(first, first + count):
        magnitude = np.float64(np.abs(totals[i]))
        total += magnitude if magnitude > above else np.float64(0)
    return total


@inlined
def _tile_gains(tile, totals, first, count):
    """(what sign gains, what ternary gains, what int4 loses) in one tile, as sums of squares."""
    size = np.float64(count)
    total = _sum_above(tile, totals, first, count, NO_LIMIT)
    above = np.float32(0.75 * total / size)
    large, largest = np.int32(0), np.uint32(0)
    for i in range(count):
        magnitude = np.abs(totals[np.uintp(first + i)])
        large += np.int32(magnitude > above)
        largest = max(largest, np.uint32(reinterpret(magnitude, np.uint32) & MAGNITUDE))
    part = _sum_above(tile, totals, first, count, above)
    # The errors of int4 spread evenly over a step.
    step = np.float64(reinterpret(largest, np.float32)) / 7
    return total * total / size, part * part / np.float64(max(large, np.int32(1))), size * step * step / 12


@kernel
def measure(tile, values, residual, losses):
    """losses (segments, LEVELS) become the sums of squares that each level would leave of values + residual.

    Those of int4 and int8 are estimates, and may be too large where a tile is nearly empty.
    """
    totals = np.zeros(SEGMENT, np.float32)
    for start in range(0, values.size, SEGMENT):
        count = min(SEGMENT, values.size - start)
        for i in range(np.uintp(count)):
            totals[i] = values[np.uintp(start) + i] + residual[np.uintp(start) + i]
        totals[count : (count + WIDTH - 1) // WIDTH * WIDTH] = np.float32(0)
        sign, ternary, int4 = 0.0, 0.0, 0.0
        if tile == WIDTH and count == SEGMENT:
            energy = _energy(totals, SEGMENT)
            for first in range(0, SEGMENT, WIDTH):
                by_sign, by_ternary, left = _tile_gains(WIDTH, totals, first, WIDTH)
                sign, ternary, int4 = sign + by_sign, ternary + by_ternary, int4 + left
        else:
            energy = _energy(totals, count)
            for first in range(0, count, tile):
                by_sign, by_ternary, left = _tile_gains(tile, totals, first, min(tile, count - first))
                sign, ternary, int4 = sign + by_sign, ternary + by_ternary, int4 + left
        row = losses[start // SEGMENT]
        row[SKIP] = energy
        row[SIGN] = max(energy - sign, 0.0)
        row[TERNARY] = max(energy - ternary, 0.0)
        row[INT4] = min(int4, row[TERNARY])
        row[INT8] = min(int4 * (7.0 / 127) ** 2, row[INT4])


@kernel
def improve(losses, counts, tile, lowest, saved, cost, reached):
    """How each segment gets better step by step, every step the best buy: the lower convex hull of its levels.

    `losses` (n, LEVELS), `counts` (n,) elements, `lowest` (n,) the levels of which there is no choice. Row i of
    saved, cost and reached (n, LEVELS - 1) gets the sum of squares that a step saves, the bytes that it costs, and
    the level that it leads to. Later steps save less a byte; where there is none, saved is 0.
    """
    for i in range(counts.size):
        now = np.intp(lowest[i])
        for step in range(LEVELS - 1):
            best, best_rate = np.intp(-1), 0.0
            for level in range(now + 1, LEVELS):
                bytes_more = segment_bytes(level, counts[i], tile) - segment_bytes(now, counts[i], tile)
                rate = (losses[i, now] - losses[i, level]) / max(bytes_more, 1)
                if rate > best_rate:
                    best, best_rate = np.intp(level), rate
            saved[i, step] = losses[i, now] - losses[i, best] if best >= 0 else 0.0
            if best >= 0:
                cost[i, step] = segment_bytes(best, counts[i], tile) - segment_bytes(now, counts[i], tile)
                reached[i, step] = best
                now = best


# --------------------------------------------------------------------------- frames of segments


@kernel
def encode(tile, levels, values, residual, frame):
    """Encode values + residual at these levels (segments,). Returns the frame's bytes.

    The residual becomes what the frame does not hold: all of it where a segment is skipped.
    """
    for segment in range(levels.size):
        store(frame, segment, levels[segment])
    at = levels.size
    for segment in range(levels.size):
        start = segment * SEGMENT
        stop = min(start + SEGMENT, values.size)
        level = np.int64(levels[segment])
        size = segment_bytes(level, stop - start, tile)
        part, rest, room = values[start:stop], residual[start:stop], frame[at : at + size]
        if level == SIGN:
            encode_sign(tile, part, rest, room, _NO_SEED)
        elif level == TERNARY:
            encode_ternary(tile, part, rest, room, _NO_SEED)
        elif level == INT4:
            encode_int4(tile, part, rest, room, _NO_SEED)
        elif level == INT8:
            encode_int8(tile, part, rest, room, _NO_SEED)
        else:
            for i in range(np.uintp(stop - start)):
                rest[i] += part[i]
        at += size
    return at


@inlined
def _kind_of(level):
    """Encoding.kind of the member whose frame a segment is."""
    if level == SIGN:
        return memory.SIGN
    if level == TERNARY:
        return memory.TERNARY
    return memory.INT4 if level == INT4 else memory.INT8


@kernel
def decode_segment(tile, frame, at, start, out, add):
    """Decode the segment that begins at element `start` into `out` (count,), or add it; returns where the next lies.

    `at` is where this one lies in the frame, which has been sized: the first one after all the level bytes.
    """
    level = np.int64(load(frame, start // SEGMENT, np.uint8))
    if level == SKIP:
        if not add:
            out[:] = np.float32(0)
        return at
    end = at + segment_bytes(level, out.size, tile)
    family.decode(_kind_of(level), tile, frame[at:end], out, add)
    return end


@kernel
def decode(tile, frame, out, add):
    """Decode a sized frame into `out`, or add its values to it."""
    at = (out.size + SEGMENT - 1) // SEGMENT
    for start in range(0, out.size, SEGMENT):
        at = decode_segment(tile, frame, at, start, out[start : min(start + SEGMENT, out.size)], add)


@kernel
def frame_size(frame, elements, tile):
    """What the levels at the head of a frame say that it takes; -1 where there is no such level."""
    size = (elements + SEGMENT - 1) // SEGMENT
    for start in range(0, elements, SEGMENT):
        level = np.int64(load(frame, start // SEGMENT, np.uint8))
        if level >= LEVELS:
            return -1
        size += segment_bytes(level, min(SEGMENT, elements - start), tile)
    return size


@kernel
def faults(tile, frame, elements):
    """(segments with a scale, segments with a code) of a sized frame that no encoder writes."""
    wrong_scales, wrong_codes = 0, 0
    at = (elements + SEGMENT - 1) // SEGMENT
    for start in range(0, elements, SEGMENT):
        count = min(SEGMENT, elements - start)
        level = np.int64(load(frame, start // SEGMENT, np.uint8))
        tiles = (count + tile - 1) // tile if level != SKIP else 0
        end = at + segment_bytes(level, count, tile)
        wrong_scales += 0 if are_scales(frame, at, tiles, _UNSIGNED) else 1
        if level == TERNARY and largest_byte(frame[at + 2 * tiles : end], np.int64(0)) >= _TRITS:
            wrong_codes += 1
        at = end
    return wrong_scales, wrong_codes
