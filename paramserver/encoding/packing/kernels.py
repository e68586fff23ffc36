"""Packing a run's digits into bytes, and unpacking them to codes: docs/encodings.md, "Frames".

A digit is a code as it is stored: never negative, less than the base. Byte j of a run of m elements with p
places a byte takes the digits of elements j, j + B, j + 2B, ..., B = ceil(m / p), so that whole vectors of
bytes are made and taken apart by the same shifts. Digit buffers have SPARE places beyond a run.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding.compiled import inlined, kernel
from paramserver.encoding.memory.kernels import FP4, INT2, INT4, RUN, TERNARY, load, store


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
    # An unsigned index spares the test for a negative one.
    for j in range(np.uintp(size)):
        store(frame, position + j, np.uint8(_byte(places, digits, j, np.uintp(size))))
    return position + size


@inlined
def _byte(places, digits, j, size):
    """`places` is a constant wherever this is compiled into, and the sums of shifts become sums of vectors."""
    if places == 2:
        return digits[j] + 16 * digits[j + size]
    if places == 4:
        return digits[j] + 4 * digits[j + size] + 16 * digits[j + 2 * size] + 64 * digits[j + 3 * size]
    if places == 5:
        low = digits[j] + 3 * digits[j + size]
        return low + 9 * (digits[j + 2 * size] + 3 * digits[j + 3 * size] + 9 * digits[j + 4 * size])
    low = digits[j] + 2 * digits[j + size] + 4 * digits[j + 2 * size] + 8 * digits[j + 3 * size]
    high = digits[j + 4 * size] + 2 * digits[j + 5 * size] + 4 * digits[j + 6 * size] + 8 * digits[j + 7 * size]
    return low + 16 * high


@inlined
def unit_of(kind):
    """What a unit of an unpacked code is worth, in scales: codes of fp4 are unpacked doubled, to be integers."""
    return np.float32(0.5) if kind == FP4 else np.float32(1)


@kernel
def unpack_run(kind, frame, codes_at, start, count, codes):
    """The codes of the run of `count` elements that begins at `start` to int8 codes[0 : count] and some beyond.

    `codes_at` is the frame's byte where codes begin. `kind` has several codes a byte: int8 needs no unpacking.
    """
    if kind in (INT4, FP4):
        size, position = np.uintp(run_bytes(2, count)), codes_at + start // RUN * run_bytes(2, RUN)
        for j in range(size):
            byte = load(frame, position + j, np.uint8)
            codes[j] = np.int8((byte & 15) - 8)
            codes[j + size] = np.int8((byte >> 4) - 8)
        if kind == FP4:
            for j in range(2 * size):
                codes[j] = _doubled_fp4(codes[j])
    elif kind == INT2:
        size, position = np.uintp(run_bytes(4, count)), codes_at + start // RUN * run_bytes(4, RUN)
        for j in range(size):
            byte = load(frame, position + j, np.uint8)
            codes[j] = np.int8((byte & 3) - 2)
            codes[j + size] = np.int8(((byte >> 2) & 3) - 2)
            codes[j + 2 * size] = np.int8(((byte >> 4) & 3) - 2)
            codes[j + 3 * size] = np.int8((byte >> 6) - 2)
    elif kind == TERNARY:
        size, position = np.uintp(run_bytes(5, count)), codes_at + start // RUN * run_bytes(5, RUN)
        for j in range(size):
            number = np.uint16(load(frame, position + j, np.uint8))
            for place in range(5):
                third = np.uint16(np.uint16(number * 171) >> 9)  # a third of a byte: 171 / 512 is near enough
                codes[j + place * size] = np.int8(number - 3 * third - 1)
                number = third
    else:
        size, position = np.uintp(run_bytes(8, count)), codes_at + start // RUN * run_bytes(8, RUN)
        for j in range(size):
            byte = load(frame, position + j, np.uint8)
            for place in range(8):
                codes[j + place * size] = np.int8(1 - 2 * ((byte >> place) & 1))


@inlined
def _doubled_fp4(code):
    """Twice the value of four bits of sign and E2M1, given less 8 as int4 has them: -8..-1 are positive."""
    digit = np.int8(code & 7)
    # 0 1 2 3 4 6 8 12: from 4 on two more each, the last one another two.
    doubled = np.int8(digit + max(np.int8(digit - 4), np.int8(0)))
    doubled = np.int8(doubled + 2) if digit == 7 else doubled
    return np.int8(-doubled) if code >= 0 else doubled


@kernel
def largest_byte(frame, start):
    """The largest byte from `start` on; 0 where there is none."""
    largest = np.uint8(0)
    for i in range(start, frame.size):
        largest = max(largest, load(frame, i, np.uint8))
    return largest
