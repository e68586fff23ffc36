"""Encoding where every element has a code: one pass over memory, a run of 2,048 elements at a time in the cache.

A member is a scale of a tile, a code of a value, the digit that is stored for a code, and how many digits a
byte holds. Rounding loses nothing: a code times its scale is exact in float32 (at most 7 + 8 bits), and with
rounding to nearest it is so near to the value that their difference is exact as well (Sterbenz).
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

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

# Adding 1.5 * 2**23 rounds a float32 to an integer, half to even; the low bits of the sum are the integer.
_ROUND = np.float32(12582912.0)
_ROUND_BITS = np.int32(0x4B400000)
_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1), np.float32(2)

# --------------------------------------------------------------------- rounding a float32 to an int32


@inlined
def _nearest(scaled, counter, key):
    return np.int32(reinterpret(np.float32(scaled + _ROUND), np.int32) - _ROUND_BITS)


@inlined
def _key(seed):
    """Where a seed's counters begin and how far apart they are, an odd number: the finaliser of splitmix64."""
    mixed = np.uint64(np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15))
    mixed = np.uint64(np.uint64(mixed ^ np.uint64(mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9))
    mixed = np.uint64(np.uint64(mixed ^ np.uint64(mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB))
    mixed = np.uint64(mixed ^ np.uint64(mixed >> np.uint64(31)))
    return np.uint32(np.uint32(mixed) | np.uint32(1)), np.uint32(mixed >> np.uint64(32))


@inlined
def _stochastic(scaled, counter, key):
    """Up with the probability of the remainder: the same for the same counter and key.

    16 random bits, so that adding them to an integer of up to 8 bits never rounds up to the next one.
    """
    # A hash of 32 bits with two rounds: the constants are those of C. Wellons' hash-prospector.
    mixed = np.uint32(np.uint32(counter) * key[0] + key[1])
    mixed = np.uint32(np.uint32(mixed ^ np.uint32(mixed >> np.uint32(16))) * np.uint32(0x21F0AAAD))
    mixed = np.uint32(np.uint32(mixed ^ np.uint32(mixed >> np.uint32(15))) * np.uint32(0x735A2D97))
    mixed = np.uint32(mixed ^ np.uint32(mixed >> np.uint32(15)))
    uniform = np.float32(np.int32(mixed >> np.uint32(16))) * np.float32(2.0**-16)
    return np.int32(np.floor(np.float32(scaled + uniform)))


# -------------------------------------------------------------------------- code of a value x (1 / scale)


@inlined
def _within(code, low, high):
    return max(np.int32(low), min(np.int32(high), np.int32(code)))


@inlined
def _code_int8(round_to_integer, total, inverse, counter, key):
    return _within(round_to_integer(np.float32(total * inverse), counter, key), -127, 127)


@inlined
def _code_int4(round_to_integer, total, inverse, counter, key):
    return _within(round_to_integer(np.float32(total * inverse), counter, key), -7, 7)


@inlined
def _code_int2(round_to_integer, total, inverse, counter, key):
    return _within(round_to_integer(np.float32(total * inverse), counter, key), -2, 1)


@inlined
def _code_ternary(round_to_integer, total, inverse, counter, key):
    return _within(round_to_integer(np.float32(total * inverse), counter, key), -1, 1)


@inlined
def _code_sign(round_to_integer, total, inverse, counter, key):
    return np.int32(-1) if total < np.float32(0) else np.int32(1)


@inlined
def _code_fp4(round_to_integer, total, inverse, counter, key):
    """Twice the E2M1 value: its magnitudes lie half a unit apart up to 2, then one, from 4 on two."""
    scaled = np.float32(total * inverse)
    magnitude = np.abs(scaled)
    finer = _ONE if magnitude >= _TWO else _TWO
    finer = _HALF if magnitude >= np.float32(4) else finer
    step = np.int32(2) if magnitude >= _TWO else np.int32(1)
    step = np.int32(4) if magnitude >= np.float32(4) else step
    code = np.int32(round_to_integer(np.float32(magnitude * finer), counter, key) * step)
    code = min(np.int32(12), np.int32(code))
    return np.int32(-code) if scaled < np.float32(0) else np.int32(code)


# ------------------------------------------------------------------------------- digit of a code


@inlined
def _digit_int8(code):
    return np.uint8(code)


@inlined
def _digit_int4(code):
    return np.uint8(code + np.int32(8))


@inlined
def _digit_int2(code):
    return np.uint8(code + np.int32(2))


@inlined
def _digit_ternary(code):
    return np.uint8(code + np.int32(1))


@inlined
def _digit_sign(code):
    return np.uint8(np.uint32(code) >> np.uint32(31))


@inlined
def _digit_fp4(code):
    """0 1 2 3 4 6 8 12 to 0..7, and the sign in bit 3."""
    magnitude = np.int32(np.abs(code))
    digit = np.int32(np.int32(magnitude >> np.int32(1)) + np.int32(2)) if magnitude > np.int32(4) else magnitude
    digit = np.int32(7) if magnitude == np.int32(12) else np.int32(digit)
    return np.uint8(np.uint32(digit) | np.uint32(np.uint32(np.uint32(code) >> np.uint32(31)) << np.uint32(3)))


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
    key = _key(seed)
    zero = digit_of(code_of(_nearest, np.float32(0), np.float32(0), np.uint32(0), key))
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
    _encode(scales_127, _code_int8, _digit_int8, _ONE, 1, _nearest, tile, values, residual, frame, seed)


@kernel
def encode_int4(tile, values, residual, frame, seed):
    """As encode_int8."""
    _encode(scales_7, _code_int4, _digit_int4, _ONE, 2, _nearest, tile, values, residual, frame, seed)


@kernel
def encode_fp4(tile, values, residual, frame, seed):
    """As encode_int8."""
    _encode(scales_6, _code_fp4, _digit_fp4, _HALF, 2, _nearest, tile, values, residual, frame, seed)


@kernel
def encode_int2(tile, values, residual, frame, seed):
    """As encode_int8."""
    _encode(scales_2_signed, _code_int2, _digit_int2, _ONE, 4, _nearest, tile, values, residual, frame, seed)


@kernel
def encode_ternary(tile, values, residual, frame, seed):
    """As encode_int8."""
    _encode(scales_mean_of_large, _code_ternary, _digit_ternary, _ONE, 5, _nearest, tile, values, residual, frame, seed)


@kernel
def encode_sign(tile, values, residual, frame, seed):
    """As encode_int8."""
    _encode(scales_mean, _code_sign, _digit_sign, _ONE, 8, _nearest, tile, values, residual, frame, seed)


@kernel
def encode_int8_stochastic(tile, values, residual, frame, seed):
    """As encode_int8, rounded stochastically."""
    _encode(scales_127, _code_int8, _digit_int8, _ONE, 1, _stochastic, tile, values, residual, frame, seed)


@kernel
def encode_int4_stochastic(tile, values, residual, frame, seed):
    """As encode_int8, rounded stochastically."""
    _encode(scales_7, _code_int4, _digit_int4, _ONE, 2, _stochastic, tile, values, residual, frame, seed)


@kernel
def encode_fp4_stochastic(tile, values, residual, frame, seed):
    """As encode_int8, rounded stochastically."""
    _encode(scales_6, _code_fp4, _digit_fp4, _HALF, 2, _stochastic, tile, values, residual, frame, seed)


@kernel
def encode_int2_stochastic(tile, values, residual, frame, seed):
    """As encode_int8, rounded stochastically."""
    _encode(scales_2_signed, _code_int2, _digit_int2, _ONE, 4, _stochastic, tile, values, residual, frame, seed)
