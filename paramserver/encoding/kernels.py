"""Compiled kernels of the encodings: fp32 and bf16, and decoding of every member; the folders beside hold the rest.

Every rounding is written out, so that each build makes the same bytes. `kind` is Encoding.kind. Sizes are the
callers' duty: nothing here checks a bound.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding.compiled import inlined, kernel
from paramserver.encoding.memory.kernels import (
    BF16,
    FP32,
    INFINITY,
    INT8,
    MAGNITUDE,
    RUN,
    SPARE,
    TOPK,
    WIDTH,
    load,
    reinterpret,
    store,
)
from paramserver.encoding.packing.kernels import unit_of, unpack_run
from paramserver.encoding.sparse.kernels import kept_elements, topk_run

_SIGN = np.uint32(0x80000000)
_LARGEST_BF16 = np.uint32(0x7F7F)


# ------------------------------------------------------------------------------------ decoding


@inlined
def bf16_at(frame, position):
    """The bfloat16 at a byte of the frame, as float32."""
    bits = np.uint32(np.uint32(load(frame, position, np.uint16)) << np.uint32(16))
    return reinterpret(bits, np.float32)


@inlined
def code_unpacked(codes, i):
    return codes[np.uintp(i)]


@inlined
def code_in_frame(frame, i):
    return load(frame, i, np.int8)


@inlined
def _write_tile(code_at, codes, first, count, scale, out, at, add):
    # An unsigned index spares the test for a negative one.
    if add:
        for i in range(count):
            out[np.uintp(at + i)] += np.float32(code_at(codes, first + i)) * scale
    else:
        for i in range(count):
            out[np.uintp(at + i)] = np.float32(code_at(codes, first + i)) * scale


@inlined
def _write_tiles(code_at, codes, first, tile, unit, frame, start, count, out, add):
    """The elements [start, start + count), whose codes are codes[first : first + count]."""
    index = start // tile
    done = 0
    while done < count:
        scale = bf16_at(frame, 2 * index) * unit
        members = min(tile, count - done)
        if members == WIDTH:
            _write_tile(code_at, codes, first + done, WIDTH, scale, out, start + done, add)
        else:
            _write_tile(code_at, codes, first + done, members, scale, out, start + done, add)
        done += members
        index += 1


@inlined
def _decode_coded(kind, tile, frame, out, add):
    """A frame with a code for every element: a run is unpacked in the cache, then scaled tile by tile."""
    codes_at = 2 * ((out.size + tile - 1) // tile)
    unit = unit_of(kind)
    if kind == INT8:
        _write_tiles(code_in_frame, frame, codes_at, tile, unit, frame, 0, out.size, out, add)
    else:
        codes = np.empty(RUN + SPARE, np.int8)
        for start in range(0, out.size, RUN):
            count = min(RUN, out.size - start)
            unpack_run(kind, frame, codes_at, start, count, codes)
            _write_tiles(code_unpacked, codes, 0, tile, unit, frame, start, count, out, add)


@inlined
def _decode_runs(kind, tile, frame, out, add):
    """Any other frame: a run is decoded in the cache."""
    run, kept, first = np.empty(RUN, np.float32), 0, 0
    if kind == TOPK:
        kept = kept_elements(frame, out.size)
    for start in range(0, out.size, RUN):
        count = min(RUN, out.size - start)
        if kind == TOPK:
            first = topk_run(tile, frame, out.size, kept, start, count, first, run)
        elif kind == BF16:
            for i in range(np.uintp(count)):
                run[i] = bf16_at(frame, 2 * (start + i))
        else:
            for i in range(np.uintp(count)):
                run[i] = load(frame, 4 * (start + i), np.float32)
        if add:
            for i in range(np.uintp(count)):
                out[np.uintp(start) + i] += run[i]
        else:
            for i in range(np.uintp(count)):
                out[np.uintp(start) + i] = run[i]


@kernel
def decode(kind, tile, frame, out, add):
    """Decode a whole checked frame into `out`, or add its values to it."""
    if kind in (FP32, BF16, TOPK):
        _decode_runs(kind, tile, frame, out, add)
    else:
        _decode_coded(kind, tile, frame, out, add)


# ------------------------------------------------------------------------------------ encoding


@kernel
def encode_fp32(values, residual, frame):
    """Values + residual as they are; the residual is spent."""
    for i in range(values.size):
        store(frame, 4 * i, values[i] + residual[i])
        residual[i] = np.float32(0)


@inlined
def _bf16_of(value):
    """The code as the upper half of a float32's bits, rounded to nearest, half to even; never up to infinity.

    What is not finite stays so, for `check` to find.
    """
    bits = reinterpret(value, np.uint32)
    magnitude = bits & MAGNITUDE
    top = np.uint32(magnitude >> np.uint32(16))
    rounded = np.uint32(magnitude + np.uint32(0x7FFF) + (top & np.uint32(1))) >> np.uint32(16)
    rounded = min(np.uint32(rounded), _LARGEST_BF16)
    code = np.uint32(top | np.uint32(0x40)) if magnitude >= INFINITY else np.uint32(rounded)
    return np.uint32(code | np.uint32((bits & _SIGN) >> np.uint32(16)))


@kernel
def encode_bf16(values, residual, frame):
    """Encode values + residual; the residual becomes what the frame does not hold."""
    for i in range(values.size):
        total = values[i] + residual[i]
        code = _bf16_of(total)
        store(frame, 2 * i, np.uint16(code))
        residual[i] = total - reinterpret(np.uint32(code << np.uint32(16)), np.float32)


@kernel
def encode_bf16_plain(values, frame):
    """Encode values alone."""
    for i in range(values.size):
        store(frame, 2 * i, np.uint16(_bf16_of(values[i])))


@kernel
def delta_fp32(weights, published, frame):
    """Encode weights - published; published moves as decoding the frame moves it."""
    for i in range(np.uintp(weights.size)):
        delta = weights[i] - published[i]
        store(frame, 4 * i, delta)
        published[i] += delta


@kernel
def delta_bf16(weights, published, frame):
    """As delta_fp32."""
    for i in range(np.uintp(weights.size)):
        code = _bf16_of(weights[i] - published[i])
        store(frame, 2 * i, np.uint16(code))
        published[i] += reinterpret(np.uint32(code << np.uint32(16)), np.float32)


# ------------------------------------------------------------------------------------ checking


@kernel
def largest_bits32(frame, words):
    """The largest magnitude, as bits, among the first `words` float32 of the frame."""
    largest = np.uint32(0)
    for i in range(words):
        largest = max(largest, np.uint32(load(frame, 4 * i, np.uint32) & MAGNITUDE))
    return largest


@kernel
def largest_bits16(frame, words):
    """The same among bfloat16: sign taken off, the 15 bits that are left."""
    largest = np.uint16(0)
    for i in range(words):
        largest = max(largest, np.uint16(load(frame, 2 * i, np.uint16) & np.uint16(0x7FFF)))
    return largest
