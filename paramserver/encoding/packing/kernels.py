"""Packing a run's digits into bytes, and unpacking them to codes: docs/encodings.md, "Frames".

A digit is a code as it is stored: never negative, less than the base. Byte j of a run of m elements with p
places a byte takes the digits of elements j, j + B, j + 2B, ..., B = ceil(m / p), so that whole vectors of
bytes are made and taken apart by the same shifts. Digit buffers have SPARE places beyond a run.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding.compiled import inlined, kernel
from paramserver.encoding.memory.kernels import FP4, INT2, INT4, INT8, RUN, TERNARY, load, store

_ONE, _TWO, _THREE, _FOUR = np.uint8(1), np.uint8(2), np.uint8(3), np.uint8(4)


@inlined
def run_bytes(places, count):
    """How many bytes a run of `count` elements takes."""
    return (count + places - 1) // places


@inlined
def pack(places, digits, zero, count, frame, position):
    """Write the digits of a run to byte `position` on; returns the position after it. `zero` is the digit of zero."""
    size = run_bytes(places, count)
    for i in range(count, places * size):
        digits[i] = zero
    if count == RUN:
        _pack_bytes(places, digits, run_bytes(places, RUN), frame, position)
    else:
        _pack_bytes(places, digits, size, frame, position)
    return position + size


@inlined
def _pack_bytes(places, digits, size, frame, position):
    size = np.uintp(size)
    if places == 1:
        for j in range(size):
            store(frame, position + j, digits[j])
    elif places == 2:
        for j in range(size):
            store(frame, position + j, np.uint8(digits[j] | np.uint8(digits[j + size] << _FOUR)))
    elif places == 4:
        for j in range(size):
            low = np.uint8(digits[j] | np.uint8(digits[j + size] << _TWO))
            high = np.uint8(digits[j + 2 * size] | np.uint8(digits[j + 3 * size] << _TWO))
            store(frame, position + j, np.uint8(low | np.uint8(high << _FOUR)))
    elif places == 5:
        for j in range(size):
            number = np.uint8(digits[j + 3 * size] + np.uint8(_THREE * digits[j + 4 * size]))
            number = np.uint8(digits[j + 2 * size] + np.uint8(_THREE * number))
            number = np.uint8(digits[j + size] + np.uint8(_THREE * number))
            store(frame, position + j, np.uint8(digits[j] + np.uint8(_THREE * number)))
    else:
        for j in range(size):
            number = np.uint8(digits[j + 6 * size] | np.uint8(digits[j + 7 * size] << _ONE))
            number = np.uint8(digits[j + 5 * size] | np.uint8(number << _ONE))
            number = np.uint8(digits[j + 4 * size] | np.uint8(number << _ONE))
            number = np.uint8(digits[j + 3 * size] | np.uint8(number << _ONE))
            number = np.uint8(digits[j + 2 * size] | np.uint8(number << _ONE))
            number = np.uint8(digits[j + size] | np.uint8(number << _ONE))
            store(frame, position + j, np.uint8(digits[j] | np.uint8(number << _ONE)))


@kernel
def places_of(kind):
    """Codes a byte of a kind that has a code for every element."""
    if kind == INT8:
        return 1
    if kind in (INT4, FP4):
        return 2
    if kind == INT2:
        return 4
    if kind == TERNARY:
        return 5
    return 8


@inlined
def unit_of(kind):
    """What a unit of an unpacked code is worth, in scales: codes of fp4 are unpacked doubled, to be integers."""
    return np.float32(0.5) if kind == FP4 else np.float32(1)


@kernel
def unpack_run(kind, frame, codes_at, start, count, codes):
    """The codes of the run of `count` elements that begins at `start` to int8 codes[0 : count] and some beyond.

    `codes_at` is the frame's byte where codes begin. `kind` is one that has a code for every element.
    """
    places = places_of(kind)
    position = codes_at + start // RUN * run_bytes(places, RUN)
    if count == RUN:
        _unpack(kind, frame, position, RUN, codes)
    else:
        _unpack(kind, frame, position, count, codes)


@inlined
def _unpack(kind, frame, position, count, codes):
    if kind == INT8:
        for j in range(np.uintp(count)):
            codes[j] = load(frame, position + j, np.int8)
    elif kind == INT4:
        size = np.uintp(run_bytes(2, count))
        for j in range(size):
            byte = load(frame, position + j, np.uint8)
            codes[j] = np.int8(np.uint8(byte & np.uint8(15)) - np.uint8(8))
            codes[j + size] = np.int8(np.uint8(byte >> _FOUR) - np.uint8(8))
    elif kind == FP4:
        size = np.uintp(run_bytes(2, count))
        for j in range(size):
            byte = load(frame, position + j, np.uint8)
            codes[j] = doubled_fp4(np.uint8(byte & np.uint8(15)))
            codes[j + size] = doubled_fp4(np.uint8(byte >> _FOUR))
    elif kind == INT2:
        size = np.uintp(run_bytes(4, count))
        for j in range(size):
            byte = load(frame, position + j, np.uint8)
            codes[j] = np.int8(np.uint8(byte & _THREE) - _TWO)
            codes[j + size] = np.int8(np.uint8(np.uint8(byte >> _TWO) & _THREE) - _TWO)
            codes[j + 2 * size] = np.int8(np.uint8(np.uint8(byte >> _FOUR) & _THREE) - _TWO)
            codes[j + 3 * size] = np.int8(np.uint8(byte >> np.uint8(6)) - _TWO)
    elif kind == TERNARY:
        size = np.uintp(run_bytes(5, count))
        for j in range(size):
            number = load(frame, position + j, np.uint8)
            for place in range(4):
                # A third of a byte: 171 / 512 is near enough.
                third = np.uint8(np.uint16(np.uint16(number) * np.uint16(171)) >> np.uint16(9))
                codes[j + place * size] = np.int8(np.uint8(number - np.uint8(_THREE * third)) - _ONE)
                number = third
            codes[j + 4 * size] = np.int8(number - _ONE)
    else:
        size = np.uintp(run_bytes(8, count))
        for j in range(size):
            byte = load(frame, position + j, np.uint8)
            for place in range(8):
                bit = np.uint8(np.uint8(byte >> np.uint8(place)) & _ONE)
                codes[j + place * size] = np.int8(_ONE - np.uint8(bit << _ONE))


@inlined
def doubled_fp4(digit):
    """Twice the value of four bits of sign and E2M1, as int8."""
    magnitude = np.int8(digit & np.uint8(7))
    high = np.int8(max(np.int8(magnitude - np.int8(4)), np.int8(0)))
    # 0 1 2 3 4 6 8 12: from 4 on two more each, the last one another two.
    doubled = np.int8(magnitude + high)
    doubled = np.int8(doubled + np.int8(2)) if magnitude == np.int8(7) else doubled
    return np.int8(-doubled) if digit >= np.uint8(8) else doubled


@kernel
def largest_byte(frame, start):
    """The largest byte from `start` on; 0 where there is none."""
    largest = np.uint8(0)
    for i in range(start, frame.size):
        largest = max(largest, load(frame, i, np.uint8))
    return largest
