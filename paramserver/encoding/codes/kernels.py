"""Rounding a value to a code, and the digit that is stored for it: docs/encodings.md, "Rounding, written out".

A code_ function takes how to round, the value, 1 / scale, and what only stochastic rounding looks at: a counter of
the element and the seed's key. A code times its scale is exact in float32 (at most 7 + 8 bits), and with rounding to
nearest it is so near to the value that their difference is exact as well (Sterbenz).
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding.compiled import inlined
from paramserver.encoding.memory.kernels import reinterpret

# Adding 1.5 * 2**23 rounds a float32 to an integer, half to even; the low bits of the sum are the integer.
_ROUND = np.float32(12582912.0)
_ROUND_BITS = np.int32(0x4B400000)
_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1), np.float32(2)

# --------------------------------------------------------------------- rounding a float32 to an int32


@inlined
def nearest(scaled, counter, key):
    return np.int32(reinterpret(np.float32(scaled + _ROUND), np.int32) - _ROUND_BITS)


@inlined
def key_of(seed):
    """Where a seed's counters begin and how far apart they are, an odd number: the finaliser of splitmix64."""
    mixed = np.uint64(np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15))
    mixed = np.uint64(np.uint64(mixed ^ np.uint64(mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9))
    mixed = np.uint64(np.uint64(mixed ^ np.uint64(mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB))
    mixed = np.uint64(mixed ^ np.uint64(mixed >> np.uint64(31)))
    return np.uint32(np.uint32(mixed) | np.uint32(1)), np.uint32(mixed >> np.uint64(32))


@inlined
def stochastic(scaled, counter, key):
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
def code_int8(round_to_integer, total, inverse, counter, key):
    return _within(round_to_integer(np.float32(total * inverse), counter, key), -127, 127)


@inlined
def code_int4(round_to_integer, total, inverse, counter, key):
    return _within(round_to_integer(np.float32(total * inverse), counter, key), -7, 7)


@inlined
def code_int2(round_to_integer, total, inverse, counter, key):
    return _within(round_to_integer(np.float32(total * inverse), counter, key), -2, 1)


@inlined
def code_ternary(round_to_integer, total, inverse, counter, key):
    return _within(round_to_integer(np.float32(total * inverse), counter, key), -1, 1)


@inlined
def code_sign(round_to_integer, total, inverse, counter, key):
    return np.int32(-1) if total < np.float32(0) else np.int32(1)


@inlined
def code_fp4(round_to_integer, total, inverse, counter, key):
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
def digit_int8(code):
    return np.uint8(code)


@inlined
def digit_int4(code):
    return np.uint8(code + np.int32(8))


@inlined
def digit_int2(code):
    return np.uint8(code + np.int32(2))


@inlined
def digit_ternary(code):
    return np.uint8(code + np.int32(1))


@inlined
def digit_sign(code):
    return np.uint8(np.uint32(code) >> np.uint32(31))


@inlined
def digit_fp4(code):
    """0 1 2 3 4 6 8 12 to 0..7, and the sign in bit 3."""
    magnitude = np.int32(np.abs(code))
    digit = np.int32(np.int32(magnitude >> np.int32(1)) + np.int32(2)) if magnitude > np.int32(4) else magnitude
    digit = np.int32(7) if magnitude == np.int32(12) else np.int32(digit)
    return np.uint8(np.uint32(digit) | np.uint32(np.uint32(np.uint32(code) >> np.uint32(31)) << np.uint32(3)))
