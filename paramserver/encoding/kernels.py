"""Compiled kernels of the encodings: every rounding is written out, so that each build makes the same bytes.

Frames are byte buffers of any alignment, read and written through `load` and `store`; arrays are float32
and C-contiguous. Sizes are the callers' duty: nothing here checks a bound. `kind` is Encoding.kind.

Rounding never loses anything: a code times its scale is exact in float32 (7 + 12 bits), and it is so near
to the value that their difference is exact as well (Sterbenz), so decode(frame) + residual is the input.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import sys

import numpy as np
from numba import types

from paramserver.encoding.compiled import inlined, kernel, primitive

if sys.byteorder != "little":
    raise ImportError("paramserver's kernels need a little-endian machine: the wire format is little-endian")

FP32, BF16, INT8 = 0, 1, 2

RUN = 4096  # elements that int8 encodes at a time: 16 KiB of residual, half of a usual L1

WIDTH = 64  # the usual tile; as a constant it spares each tile the loop's remainder

_INFINITY_BITS = np.uint32(0x7F800000)  # magnitudes from here on are infinite or NaN
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)

# 12 mantissa bits: a scale's low 12 of 23 stored bits are zero.
_SCALE_TAIL = np.uint32(0xFFF)
_SMALLEST_SCALE = np.uint32(1 << 23)  # 2**-126: its inverse is finite. What lies below stays in the residual.
LARGEST_SCALE_BITS = np.uint32(0x7BFFF000)  # (2 - 2**-11) * 2**120: times -128 it is still finite
# Adding 1.5 * 2**23 rounds a float32 to an integer, half to even; the low byte of the sum's bits is the integer.
_ROUND = np.float32(12582912.0)
_LARGEST_BF16 = np.uint32(0x7F7F)


@primitive
def load(typingctx, array, position, kind):
    """The value of numpy type `kind` at byte `position` of a contiguous uint8 array, of any alignment."""
    if not (isinstance(array, types.Array) and array.layout == "C" and array.dtype == types.uint8):
        return None
    value = kind.instance_type

    def build(context, builder, signature, arguments):
        buffer = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.gep(buffer.data, [arguments[1]])
        found = builder.load(builder.bitcast(address, context.get_value_type(value).as_pointer()))
        found.align = 1
        return found

    return value(array, types.intp, kind), build


@primitive
def store(typingctx, array, position, value):
    """Write `value` at byte `position` of a contiguous, writable uint8 array, at any alignment."""
    if not (isinstance(array, types.Array) and array.layout == "C" and array.mutable and array.dtype == types.uint8):
        return None

    def build(context, builder, signature, arguments):
        buffer = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.gep(buffer.data, [arguments[1]])
        written = builder.store(arguments[2], builder.bitcast(address, arguments[2].type.as_pointer()))
        written.align = 1
        return context.get_dummy_value()

    return types.none(array, types.intp, value), build


@primitive
def reinterpret(typingctx, value, kind):
    """The bits of a 32-bit number as those of the 32-bit numpy type `kind`."""
    target = kind.instance_type
    if getattr(value, "bitwidth", 0) != 32 or target.bitwidth != 32:
        return None

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(target))

    return target(value, kind), build


# ------------------------------------------------------------------------------------ decoding


@inlined
def _decode_tile(frame, codes, count, scale, out, at):
    """The `count` codes from byte `codes` on, all of one tile, to out[at:]."""
    for i in range(count):
        out[np.uintp(at + i)] = np.float32(load(frame, codes + i, np.int8)) * scale


@inlined
def _decode_int8(tile, frame, elements, start, stop, out):
    codes = 4 * ((elements + tile - 1) // tile)
    index = start // tile
    position = start
    while position < stop:
        end = min((index + 1) * tile, stop)
        scale = load(frame, 4 * index, np.float32)
        if end - position == WIDTH:
            _decode_tile(frame, codes + position, WIDTH, scale, out, position - start)
        else:
            _decode_tile(frame, codes + position, end - position, scale, out, position - start)
        position = end
        index += 1


@kernel
def decode_run(kind, tile, frame, elements, start, stop, out):
    """Decode elements [start, stop) of a checked frame of `elements` into out[0 : stop - start]."""
    if kind == FP32:
        for i in range(stop - start):
            out[i] = load(frame, 4 * (start + i), np.float32)
    elif kind == BF16:
        for i in range(stop - start):
            bits = np.uint32(load(frame, 2 * (start + i), np.uint16)) << np.uint32(16)
            out[i] = reinterpret(np.uint32(bits), np.float32)
    else:
        _decode_int8(tile, frame, elements, start, stop, out)


@kernel
def decode(kind, tile, frame, out):
    """Decode a whole checked frame into `out`."""
    decode_run(kind, tile, frame, out.size, 0, out.size, out)


@kernel
def decode_add(kind, tile, frame, out):
    """out += the values of a whole checked frame."""
    run = np.empty(RUN, np.float32)
    for start in range(0, out.size, RUN):
        stop = min(start + RUN, out.size)
        decode_run(kind, tile, frame, out.size, start, stop, run)
        for i in range(stop - start):
            out[np.uintp(start + i)] += run[np.uintp(i)]


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
    magnitude = bits & _MAGNITUDE
    top = np.uint32(magnitude >> np.uint32(16))
    rounded = np.uint32(magnitude + np.uint32(0x7FFF) + (top & np.uint32(1))) >> np.uint32(16)
    rounded = min(np.uint32(rounded), _LARGEST_BF16)
    code = np.uint32(top | np.uint32(0x40)) if magnitude >= _INFINITY_BITS else np.uint32(rounded)
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


@inlined
def _scale_of(largest):
    """The scale for a tile whose largest magnitude has these bits: a 127th of it, rounded up to 12 mantissa bits."""
    bits = reinterpret(reinterpret(largest, np.float32) / np.float32(127), np.uint32)
    bits = np.uint32(np.uint32(bits + _SCALE_TAIL) & ~_SCALE_TAIL)
    bits = np.uint32(min(max(bits, _SMALLEST_SCALE), LARGEST_SCALE_BITS))
    bits = np.uint32(0) if largest == np.uint32(0) else bits
    bits = _INFINITY_BITS if largest >= _INFINITY_BITS else bits
    return reinterpret(np.uint32(bits), np.float32)


@inlined
def _add_values(values, residual, start, count):
    """residual += values in [start, start + count); returns the largest magnitude's bits."""
    largest = np.uint32(0)
    for i in range(count):
        total = values[np.uintp(start + i)] + residual[np.uintp(start + i)]
        residual[np.uintp(start + i)] = total
        # The integer maximum vectorises, that of floats does not; magnitudes order as their bits.
        largest = max(largest, np.uint32(reinterpret(total, np.uint32) & _MAGNITUDE))
    return largest


@inlined
def _write_codes(residual, frame, codes, start, count, scale, inverse):
    """Codes of [start, start + count), all of one tile, to byte `codes` and on; the residual keeps the rest."""
    for i in range(count):
        total = residual[np.uintp(start + i)]
        rounded = np.float32(total * inverse) + _ROUND
        # Beyond 127 only where the scale is at its upper limit.
        code = np.int32(reinterpret(rounded, np.int32) - np.int32(0x4B400000))
        code = max(np.int32(-127), min(np.int32(127), code))
        store(frame, codes + i, np.int8(code))
        residual[np.uintp(start + i)] = total - np.float32(code) * scale


@inlined
def _encode_tiles(tile, whole, values, residual, frame, scales, codes, start, stop, inverses):
    """The tiles of [start, stop), all `whole` or the last one ragged, in three passes over what the cache holds.

    Each tile's scale waits for two divisions; side by side they overlap.
    """
    tiles = (stop - start + tile - 1) // tile
    for k in range(tiles):
        low = start + k * tile
        count = tile if whole else min(tile, stop - low)
        inverses[k] = reinterpret(_add_values(values, residual, low, count), np.float32)
    for k in range(tiles):
        scale = _scale_of(reinterpret(inverses[k], np.uint32))
        store(frame, scales + 4 * k, scale)
        inverses[k] = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
    for k in range(tiles):
        low = start + k * tile
        count = tile if whole else min(tile, stop - low)
        scale = load(frame, scales + 4 * k, np.float32)
        _write_codes(residual, frame, codes + low, low, count, scale, inverses[k])


@kernel
def encode_int8(tile, values, residual, frame):
    """Encode values + residual; the residual becomes what the frame does not hold."""
    codes = 4 * ((values.size + tile - 1) // tile)
    run = max(RUN, tile)
    inverses = np.empty(run // tile, np.float32)
    for start in range(0, values.size, run):
        stop = min(start + run, values.size)
        scales = 4 * (start // tile)
        if tile == WIDTH and (stop - start) % WIDTH == 0:
            _encode_tiles(WIDTH, True, values, residual, frame, scales, codes, start, stop, inverses)
        else:
            _encode_tiles(tile, False, values, residual, frame, scales, codes, start, stop, inverses)


# ------------------------------------------------------------------------------------ checking


@kernel
def largest_bits32(frame, words):
    """The largest magnitude, as bits, among the first `words` float32 of the frame."""
    largest = np.uint32(0)
    for i in range(words):
        largest = max(largest, np.uint32(load(frame, 4 * i, np.uint32) & _MAGNITUDE))
    return largest


@kernel
def largest_bits16(frame, words):
    """The same among bfloat16: sign taken off, the 15 bits that are left."""
    largest = np.uint16(0)
    for i in range(words):
        largest = max(largest, np.uint16(load(frame, 2 * i, np.uint16) & np.uint16(0x7FFF)))
    return largest
