"""Sums of magnitudes in the written order, as vectors: docs/encodings.md, "Rounding, written out".

Loops say the same, but the order is fixed, so the compiler turns them into single additions. Lanes are 64
float32; magnitudes that are not above a limit count as zero, and a limit below zero lets all through, NaN too.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from paramserver.encoding.compiled import primitive
from paramserver.encoding.memory.kernels import MAGNITUDE, WIDTH

TILES = 16  # whose sums are finished together: as many as a vector of 512 bits holds
NO_LIMIT = np.float32(-1)

_FLOAT, _INT32 = ir.FloatType(), ir.IntType(32)


def _floats(width):
    return ir.VectorType(_FLOAT, width)


def _picked(builder, one, other, lanes):
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes))


def _loaded(context, builder, kind, array, position):
    """64 float32 from array[position] on, and their address."""
    data = context.make_array(kind)(context, builder, array).data
    address = builder.bitcast(builder.gep(data, [position]), _floats(WIDTH).as_pointer())
    return builder.load(address, align=4), address


def _magnitudes(builder, lanes):
    bits = builder.bitcast(lanes, ir.VectorType(_INT32, WIDTH))
    mask = ir.Constant(bits.type, [int(MAGNITUDE)] * WIDTH)
    return builder.bitcast(builder.and_(bits, mask), lanes.type)


def _above(builder, magnitudes, limit):
    """Those that are above the limit, or NaN, and zeros for the others."""
    one = builder.insert_element(ir.Constant(_floats(WIDTH), ir.Undefined), limit, _INT32(0))
    limits = _picked(builder, one, one, [0] * WIDTH)
    zeros = ir.Constant(_floats(WIDTH), [0.0] * WIDTH)
    return builder.select(builder.fcmp_unordered(">", magnitudes, limits), magnitudes, zeros)


def _halved(builder, lanes, width):
    """Lanes l and l + half are added until `width` of them are left."""
    held = lanes.type.count
    while held > width:
        held //= 2
        lower, upper = (_picked(builder, lanes, lanes, list(range(first, first + held))) for first in (0, held))
        lanes = builder.fadd(lower, upper)
    return lanes


def _finished(builder, parts):
    """One sum for each of 16 vectors of 16 lanes, in their order: two vectors are halved into one at a time."""
    width = TILES
    while width > 1:
        firsts = range(0, 2 * TILES, width)  # where the lanes of a tile begin in two vectors
        half = width // 2
        lower = [first + lane for first in firsts for lane in range(half)]
        upper = [first + half + lane for first in firsts for lane in range(half)]
        parts = [
            builder.fadd(_picked(builder, one, other, lower), _picked(builder, one, other, upper))
            for one, other in zip(parts[::2], parts[1::2], strict=True)
        ]
        width = half
    return parts[0]


def _is_float32(array):
    return isinstance(array, types.Array) and array.layout == "C" and array.dtype == types.float32


@primitive
def sum_above(typingctx, totals, first, blocks, limit):
    """The sum of the magnitudes above `limit` of a tile: `blocks` times 64 of totals[first:]."""
    if not _is_float32(totals):
        return None

    def build(context, builder, signature, arguments):
        array, start, count, least = arguments
        held = cgutils.alloca_once_value(builder, ir.Constant(_floats(WIDTH), [0.0] * WIDTH))
        with cgutils.for_range(builder, count) as loop:
            position = builder.add(start, builder.mul(loop.index, start.type(WIDTH)))
            lanes, _ = _loaded(context, builder, signature.args[0], array, position)
            large = _above(builder, _magnitudes(builder, lanes), least)
            builder.store(builder.fadd(builder.load(held), large), held)
        return builder.extract_element(_halved(builder, builder.load(held), 1), _INT32(0))

    return types.float32(totals, types.intp, types.intp, types.float32), build


@primitive
def add_and_sum(typingctx, values, at, totals, first, blocks):
    """Add a tile of values to totals, `blocks` times 64 from values[at:] to totals[first:]; the sum of magnitudes."""
    if not (_is_float32(values) and _is_float32(totals) and totals.mutable):
        return None

    def build(context, builder, signature, arguments):
        held = cgutils.alloca_once_value(builder, ir.Constant(_floats(WIDTH), [0.0] * WIDTH))
        with cgutils.for_range(builder, arguments[4]) as loop:
            offset = builder.mul(loop.index, loop.index.type(WIDTH))
            total = _added(context, builder, signature, arguments, offset)
            builder.store(builder.fadd(builder.load(held), _magnitudes(builder, total)), held)
        return builder.extract_element(_halved(builder, builder.load(held), 1), _INT32(0))

    return types.float32(values, types.intp, totals, types.intp, types.intp), build


def _added(context, builder, signature, arguments, offset):
    """values[at + offset:] + totals[first + offset:], 64 of them, stored in totals."""
    values, at, totals, first = arguments[:4]
    addend, _ = _loaded(context, builder, signature.args[0], values, builder.add(at, offset))
    held, address = _loaded(context, builder, signature.args[2], totals, builder.add(first, offset))
    total = builder.fadd(addend, held)
    builder.store(total, address, align=4)
    return total


@primitive
def add_and_sum_tiles(typingctx, values, at, totals, first, sums, k):
    """add_and_sum of 16 tiles of 64 at once, to sums[k : k + 16]."""
    if not all(map(_is_float32, (values, totals, sums))):
        return None

    def build(context, builder, signature, arguments):
        parts = []
        for tile in range(TILES):
            total = _added(context, builder, signature, arguments, arguments[1].type(tile * WIDTH))
            parts.append(_halved(builder, _magnitudes(builder, total), TILES))
        _store_sums(context, builder, signature.args[4], arguments[4], arguments[5], _finished(builder, parts))
        return context.get_dummy_value()

    return types.none(values, types.intp, totals, types.intp, sums, types.intp), build


@primitive
def sum_above_tiles(typingctx, totals, first, limits, sums, k):
    """sum_above of 16 tiles of 64 at once, each with its limits[k : k + 16], to sums[k : k + 16]."""
    if not all(map(_is_float32, (totals, limits, sums))):
        return None

    def build(context, builder, signature, arguments):
        kind, array = signature.args[0], arguments[0]
        least = context.make_array(signature.args[2])(context, builder, arguments[2]).data
        parts = []
        for tile in range(TILES):
            number = arguments[1].type(tile)
            position = builder.add(arguments[1], arguments[1].type(tile * WIDTH))
            limit = builder.load(builder.gep(least, [builder.add(arguments[4], number)]))
            lanes, _ = _loaded(context, builder, kind, array, position)
            parts.append(_halved(builder, _above(builder, _magnitudes(builder, lanes), limit), TILES))
        _store_sums(context, builder, signature.args[3], arguments[3], arguments[4], _finished(builder, parts))
        return context.get_dummy_value()

    return types.none(totals, types.intp, limits, sums, types.intp), build


def _store_sums(context, builder, kind, array, position, sums):
    data = context.make_array(kind)(context, builder, array).data
    builder.store(sums, builder.bitcast(builder.gep(data, [position]), sums.type.as_pointer()), align=4)
