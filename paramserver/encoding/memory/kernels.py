"""What kernels are made of: machine instructions that numba has no word for, and the numbers that all of them share.

Frames are byte buffers of any alignment, read and written through `load` and `store`; arrays are float32
and C-contiguous. Sizes are the callers' duty: nothing here checks a bound.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import sys

import numpy as np
from llvmlite import ir
from numba import types

from paramserver.encoding.compiled import primitive

if sys.byteorder != "little":
    raise ImportError("paramserver's kernels need a little-endian machine: the wire format is little-endian")

# Encoding.kind
FP32, BF16, INT8, INT4, FP4, INT2, TERNARY, SIGN, TOPK = range(9)

RUN = 2048  # elements that are packed together, and worked on while the first cache holds them
SPARE = 64  # what a buffer for a run has beyond it: packed codes may end some places later
WIDTH = 64  # the usual tile; as a constant it spares each tile the loop's remainder

MAGNITUDE = np.uint32(0x7FFFFFFF)
INFINITY = np.uint32(0x7F800000)  # magnitudes from here on are infinite or NaN


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


@primitive
def prefetch(typingctx, array, position):
    """Ask for the cache line of array[position], which may lie beyond the array, into the second cache."""
    if not isinstance(array, types.Array):
        return None

    def build(context, builder, signature, arguments):
        buffer = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.bitcast(builder.gep(buffer.data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
        builder.call(ask, [address, number(0), number(2), number(1)])  # to read, second nearest, data
        return context.get_dummy_value()

    return types.none(array, types.intp), build
