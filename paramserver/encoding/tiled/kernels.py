"""Encoding where every element has a code: one pass over memory, a run of 2,048 elements at a time in the cache.

A member is a scale of a tile, a code of a value, the digit that is stored for a code, and how many digits a
byte holds.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding.codes.kernels import (
    code_fp4,
    code_int2,
    code_int4,
    code_int8,
    code_sign,
    code_ternary,
    digit_fp4,
    digit_int2,
    digit_int4,
    digit_int8,
    digit_sign,
    digit_ternary,
    key_of,
    nearest,
    stochastic,
)
from paramserver.encoding.compiled import inlined, kernel
from paramserver.encoding.memory.kernels import RUN, SPARE, WIDTH, prefetch, reinterpret, store
from paramserver.encoding.packing.kernels import pack
from paramserver.encoding.scales.kernels import (
    scales_2_signed,
    scales_6,
    scales_7,
    scales_127,
    scales_mean,
    scales_mean_of_large,
)

_LINE = 16  # float32 of a cache line
_HALF, _ONE = np.float32(0.5), np.float32(1)

# -------------------------------------------------------------------- a chunk: a run, or a longer tile
# Arrays are arguments of their own: a tuple of them would be taken apart, and their references counted, at each run.


@inlined
def _round_part(
    code_of, digit_of, unit, rounding, is_delta, totals, first, count, digits, place, scale, inverse, random, others, at
):
    """Digits of totals[first : first + count], all of one tile, to `place` and on; totals keep the rest.

    Of a delta it is others[at : at + count], the published values, that move by code x scale.
    """
    counter, key = random
    step = np.float32(scale * unit)
    for i in range(count):
        total = totals[np.uintp(first + i)]
        code = code_of(rounding, total, inverse, np.uint32(counter + i), key)
        digits[np.uintp(place + i)] = digit_of(code)
        moved = np.float32(code) * step
        if is_delta:
            others[np.uintp(at + i)] += moved
        else:
            totals[np.uintp(first + i)] = total - moved


@inlined
def _ask_for(one, other, first, count):
    """Begin to bring elements [first, first + count) of two arrays into the cache."""
    for i in range(0, count, _LINE):
        prefetch(one, first + i)
        prefetch(other, first + i)


@inlined
def _round_run(
    code_of, digit_of, unit, rounding, is_delta, tile, whole, totals, first, count, digits, place, of_tiles, random,
    values, others, ahead,
):  # fmt: skip
    """The digits of a run to `place` and on. Its tiles are the first in `of_tiles`, or one longer than a run.

    Of a delta, elements `ahead` and on of values and others are what comes next.
    """
    (scales, inverses), (counter, key) = of_tiles, random
    part = WIDTH if is_delta else RUN  # a tile is rounded at once, where nothing is to be done between
    for k in range((count + tile - 1) // tile):
        end = k * tile + (tile if whole else min(tile, count - k * tile))
        for at in range(k * tile, end, part):
            members = WIDTH if whole else min(part, end - at)
            if is_delta:
                _ask_for(values, others, ahead + at, members)
            scale, inverse, of_part = scales[k], inverses[k], (counter + at, key)
            _round_part(
                code_of, digit_of, unit, rounding, is_delta, totals, first + at, members, digits, place + at, scale,
                inverse, of_part, others, counter + at,
            )  # fmt: skip


@inlined
def _store_scales(scales, inverses, tiles, frame, position):
    for k in range(tiles):
        inverses[k] = _ONE / scales[k] if scales[k] != np.float32(0) else np.float32(0)
        bits = reinterpret(scales[k], np.uint32)
        store(frame, position + 2 * k, np.uint16(np.uint32(bits >> np.uint32(16))))


@inlined
def _buffers(places, tile, chunk, frame):
    """Digits of a run, scales and 1 / scale of a chunk's tiles. What takes a whole byte needs no packing."""
    digits = frame if places == 1 else np.empty(RUN + SPARE, np.uint8)
    return digits, np.empty(chunk // tile, np.float32), np.empty(chunk // tile, np.float32)


@inlined
def _encode_chunk(
    find_scales, code_of, digit_of, unit, places, rounding, is_delta, tile, values, others, start, count, totals, base,
    digits, scales, inverses, frame, position, key,
):  # fmt: skip
    """Encode values[start:] + totals[base:], `count` of each.

    Scales go to their place in the frame, codes to `position` and on; returns the position after them. `unit` is what
    a code's unit is worth in scales. Of a delta, what comes next of values and others is asked for
    meanwhile.
    """
    zero = digit_of(code_of(nearest, np.float32(0), np.float32(0), np.uint32(0), key))
    # The usual case is compiled with its sizes as constants.
    is_usual = tile == WIDTH and count == RUN
    if is_usual:
        find_scales(WIDTH, True, values, start, totals, base, RUN, scales)
    else:
        find_scales(tile, False, values, start, totals, base, count, scales)
    _store_scales(scales, inverses, (count + tile - 1) // tile, frame, 2 * (start // tile))
    for low in range(0, count, RUN):
        run, k = min(RUN, count - low), low // tile
        place = position if places == 1 else 0
        of_tiles, random, ahead = (scales[k:], inverses[k:]), (start + low, key), start + low + max(RUN, tile)
        if is_usual:
            _round_run(
                code_of, digit_of, unit, rounding, is_delta, WIDTH, True, totals, base, RUN, digits, place, of_tiles,
                random, values, others, ahead,
            )  # fmt: skip
        else:
            _round_run(
                code_of, digit_of, unit, rounding, is_delta, tile, False, totals, base + low, run, digits, place,
                of_tiles, random, values, others, ahead,
            )  # fmt: skip
        position = position + run if places == 1 else pack(places, digits, zero, run, frame, position)
    return position


# ------------------------------------------------------------------------------ values and residual


@inlined
def _encode(find_scales, code_of, digit_of, unit, places, rounding, tile, values, residual, frame, seed):
    """Encode values + residual; where there is a residual it becomes what the frame does not hold.

    Sums lie in the residual itself, without one in a buffer of one chunk.
    """
    key = key_of(seed)
    chunk = max(RUN, tile)
    in_place = residual.size > 0
    totals = residual if in_place else np.empty(chunk, np.float32)
    digits, scales, inverses = _buffers(places, tile, chunk, frame)
    position = 2 * ((values.size + tile - 1) // tile)
    for start in range(0, values.size, chunk):
        count = min(chunk, values.size - start)
        base = start if in_place else 0
        if not in_place:
            totals[:] = np.float32(0)
        position = _encode_chunk(
            find_scales, code_of, digit_of, unit, places, rounding, False, tile, values, totals, start, count, totals,
            base, digits, scales, inverses, frame, position, key,
        )  # fmt: skip


@kernel
def encode_int8(tile, values, residual, frame, seed):
    """Encode values + residual, where there is one; it becomes what the frame does not hold."""
    _encode(scales_127, code_int8, digit_int8, _ONE, 1, nearest, tile, values, residual, frame, seed)


@kernel
def encode_int4(tile, values, residual, frame, seed):
    """As encode_int8."""
    _encode(scales_7, code_int4, digit_int4, _ONE, 2, nearest, tile, values, residual, frame, seed)


@kernel
def encode_fp4(tile, values, residual, frame, seed):
    """As encode_int8."""
    _encode(scales_6, code_fp4, digit_fp4, _HALF, 2, nearest, tile, values, residual, frame, seed)


@kernel
def encode_int2(tile, values, residual, frame, seed):
    """As encode_int8."""
    _encode(scales_2_signed, code_int2, digit_int2, _ONE, 4, nearest, tile, values, residual, frame, seed)


@kernel
def encode_ternary(tile, values, residual, frame, seed):
    """As encode_int8."""
    _encode(scales_mean_of_large, code_ternary, digit_ternary, _ONE, 5, nearest, tile, values, residual, frame, seed)


@kernel
def encode_sign(tile, values, residual, frame, seed):
    """As encode_int8."""
    _encode(scales_mean, code_sign, digit_sign, _ONE, 8, nearest, tile, values, residual, frame, seed)


@kernel
def encode_int8_stochastic(tile, values, residual, frame, seed):
    """As encode_int8, rounded stochastically."""
    _encode(scales_127, code_int8, digit_int8, _ONE, 1, stochastic, tile, values, residual, frame, seed)


@kernel
def encode_int4_stochastic(tile, values, residual, frame, seed):
    """As encode_int8, rounded stochastically."""
    _encode(scales_7, code_int4, digit_int4, _ONE, 2, stochastic, tile, values, residual, frame, seed)


@kernel
def encode_fp4_stochastic(tile, values, residual, frame, seed):
    """As encode_int8, rounded stochastically."""
    _encode(scales_6, code_fp4, digit_fp4, _HALF, 2, stochastic, tile, values, residual, frame, seed)


@kernel
def encode_int2_stochastic(tile, values, residual, frame, seed):
    """As encode_int8, rounded stochastically."""
    _encode(scales_2_signed, code_int2, digit_int2, _ONE, 4, stochastic, tile, values, residual, frame, seed)


# ------------------------------------------------------------------------------------------ deltas


@inlined
def _encode_delta(find_scales, code_of, digit_of, unit, places, tile, weights, published, frame):
    """Encode weights - published, and add to `published` what the frame holds, as decoding does: code x scale.

    A chunk's delta, then what it moves by, lie in a buffer in the cache. Going over a chunk of one array, then of the
    other, keeps the processor from reading ahead by itself, so the next one is asked for while this one is rounded.
    """
    key = key_of(0)
    chunk = max(RUN, tile)
    totals = np.empty(chunk, np.float32)
    digits, scales, inverses = _buffers(places, tile, chunk, frame)
    position = 2 * ((weights.size + tile - 1) // tile)
    for start in range(0, weights.size, chunk):
        count = min(chunk, weights.size - start)
        for i in range(np.uintp(count)):
            totals[i] = -published[np.uintp(start) + i]  # weights are added to it, which is to subtract exactly
        position = _encode_chunk(
            find_scales, code_of, digit_of, unit, places, nearest, True, tile, weights, published, start, count,
            totals, 0, digits, scales, inverses, frame, position, key,
        )  # fmt: skip


@kernel
def delta_int8(tile, weights, published, frame):
    """Encode weights - published; published moves as decoding the frame moves it."""
    _encode_delta(scales_127, code_int8, digit_int8, _ONE, 1, tile, weights, published, frame)


@kernel
def delta_int4(tile, weights, published, frame):
    """As delta_int8."""
    _encode_delta(scales_7, code_int4, digit_int4, _ONE, 2, tile, weights, published, frame)


@kernel
def delta_fp4(tile, weights, published, frame):
    """As delta_int8."""
    _encode_delta(scales_6, code_fp4, digit_fp4, _HALF, 2, tile, weights, published, frame)


@kernel
def delta_int2(tile, weights, published, frame):
    """As delta_int8."""
    _encode_delta(scales_2_signed, code_int2, digit_int2, _ONE, 4, tile, weights, published, frame)


@kernel
def delta_ternary(tile, weights, published, frame):
    """As delta_int8."""
    _encode_delta(scales_mean_of_large, code_ternary, digit_ternary, _ONE, 5, tile, weights, published, frame)


@kernel
def delta_sign(tile, weights, published, frame):
    """As delta_int8."""
    _encode_delta(scales_mean, code_sign, digit_sign, _ONE, 8, tile, weights, published, frame)
