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
from paramserver.encoding.memory.kernels import RUN, SPARE, WIDTH, reinterpret, store
from paramserver.encoding.packing.kernels import pack
from paramserver.encoding.scales.kernels import (
    scales_2_signed,
    scales_6,
    scales_7,
    scales_127,
    scales_mean,
    scales_mean_of_large,
)

_HALF, _ONE = np.float32(0.5), np.float32(1)

# ---------------------------------------------------------------------------------- one pass


@inlined
def _round_tile(code_of, digit_of, unit, rounding, totals, first, count, digits, place, scale, inverse, random):
    """Digits of totals[first : first + count], all of one tile, to `place` and on; totals keep the rest."""
    counter, key = random
    step = np.float32(scale * unit)
    for i in range(count):
        total = totals[np.uintp(first + i)]
        code = code_of(rounding, total, inverse, np.uint32(counter + i), key)
        digits[np.uintp(place + i)] = digit_of(code)
        totals[np.uintp(first + i)] = total - np.float32(code) * step


@inlined
def _round_run(code_of, digit_of, unit, rounding, tile, whole, totals, first, count, digits, place, of_tiles, random):
    """The digits of a run to `place` and on. Its tiles are the first in `of_tiles`, or one longer than a run."""
    (scales, inverses), (counter, key) = of_tiles, random
    for k in range((count + tile - 1) // tile):
        at = k * tile
        members = tile if whole else min(tile, count - at)
        scale, inverse, of_tile = scales[k], inverses[k], (counter + at, key)
        _round_tile(
            code_of, digit_of, unit, rounding, totals, first + at, members, digits, place + at, scale, inverse, of_tile
        )


@inlined
def _store_scales(scales, inverses, tiles, frame, position):
    for k in range(tiles):
        inverses[k] = _ONE / scales[k] if scales[k] != np.float32(0) else np.float32(0)
        bits = reinterpret(scales[k], np.uint32)
        store(frame, position + 2 * k, np.uint16(np.uint32(bits >> np.uint32(16))))


@inlined
def _encode(find_scales, code_of, digit_of, unit, places, rounding, tile, values, residual, frame, seed):
    """Encode values + residual; where there is a residual it becomes what the frame does not hold.

    `unit` is what a code's unit is worth in scales. Sums lie in the residual itself, without one in a buffer of one
    chunk: a run, or a longer tile.
    """
    key = key_of(seed)
    zero = digit_of(code_of(nearest, np.float32(0), np.float32(0), np.uint32(0), key))
    chunk = max(RUN, tile)
    in_place = residual.size > 0
    totals = residual if in_place else np.empty(chunk, np.float32)
    # What takes a whole byte needs no packing.
    digits = frame if places == 1 else np.empty(RUN + SPARE, np.uint8)
    scales, inverses = np.empty(chunk // tile, np.float32), np.empty(chunk // tile, np.float32)
    position = 2 * ((values.size + tile - 1) // tile)
    for start in range(0, values.size, chunk):
        count = min(chunk, values.size - start)
        tiles = (count + tile - 1) // tile
        base = start if in_place else 0
        if not in_place:
            totals[:] = np.float32(0)
        # The usual case is compiled with its sizes as constants.
        is_usual = tile == WIDTH and count == RUN
        if is_usual:
            find_scales(WIDTH, True, values, start, totals, base, RUN, scales)
        else:
            find_scales(tile, False, values, start, totals, base, count, scales)
        _store_scales(scales, inverses, tiles, frame, 2 * (start // tile))
        for low in range(0, count, RUN):
            run, k = min(RUN, count - low), low // tile
            place = position if places == 1 else 0
            of_tiles, random = (scales[k:], inverses[k:]), (start + low, key)
            if is_usual:
                _round_run(
                    code_of, digit_of, unit, rounding, WIDTH, True, totals, base, RUN, digits, place, of_tiles, random
                )
            else:
                first = base + low
                _round_run(
                    code_of, digit_of, unit, rounding, tile, False, totals, first, run, digits, place, of_tiles, random
                )
            position = position + run if places == 1 else pack(places, digits, zero, run, frame, position)


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
