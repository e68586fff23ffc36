"""Compiled kernels of the shard: each decodes an element and applies it in the same loop, so memory is passed once.

An optimiser is a step for one element; `_sweep` runs it over a block in a loop for each kind of frame, and
all of it is inlined. Arithmetic is float32 in the order written, without fastmath: the same frames give the
same weights. Factors are what Python has; a step makes each float32 first, or its loop would turn into float64.
Arrays are trusted, frames checked; weights and state are changed in place. The formulas are those of torch.optim.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding.adaptive.kernels import ADAPTIVE, decode_segment
from paramserver.encoding.compiled import inlined, kernel
from paramserver.encoding.kernels import bf16_at, code_in_frame, code_unpacked
from paramserver.encoding.memory.kernels import BF16, FP32, INT8, RUN, SPARE, TOPK, WIDTH, load
from paramserver.encoding.packing.kernels import unit_of, unpack_run
from paramserver.encoding.sparse.kernels import kept_elements, topk_run

_SET = np.bool_(False)  # decode, without adding; a plain False would be a type of its own, compiled once more


@inlined
def _tile(step, code_at, codes, first, count, scale, start, weights, state, factors):
    """Apply elements [start, start + count), one tile's. With `count` constant the loop vectorises without a rest."""
    for i in range(count):
        # An unsigned index spares the test for a negative one.
        step(np.float32(code_at(codes, first + i)) * scale, np.uintp(start + i), weights, state, factors)


@inlined
def _tiles(step, code_at, codes, first, tile, unit, frame, start, count, weights, state, factors):
    """Apply elements [start, start + count), whose codes are codes[first : first + count]."""
    index = start // tile
    done = 0
    while done < count:
        scale = bf16_at(frame, 2 * index) * unit
        members = min(tile, count - done)
        if members == WIDTH:
            _tile(step, code_at, codes, first + done, WIDTH, scale, start + done, weights, state, factors)
        else:
            _tile(step, code_at, codes, first + done, members, scale, start + done, weights, state, factors)
        done += members
        index += 1


@inlined
def _sweep_codes(step, kind, tile, frame, weights, state, factors):
    """A frame with a code for every element: a run is unpacked in the cache, then stepped tile by tile."""
    elements = weights.size
    codes_at = 2 * ((elements + tile - 1) // tile)
    unit = unit_of(kind)
    if kind == INT8:
        _tiles(step, code_in_frame, frame, codes_at, tile, unit, frame, 0, elements, weights, state, factors)
    else:
        codes = np.empty(RUN + SPARE, np.int8)
        for start in range(0, elements, RUN):
            count = min(RUN, elements - start)
            unpack_run(kind, frame, codes_at, start, count, codes)
            _tiles(step, code_unpacked, codes, 0, tile, unit, frame, start, count, weights, state, factors)


@inlined
def _sweep_runs(step, kind, tile, frame, weights, state, factors):
    """Any other frame: a run is decoded in the cache, then stepped."""
    elements = weights.size
    run, kept, first = np.empty(RUN, np.float32), kept_elements(frame, elements), 0
    for start in range(0, elements, RUN):
        count = min(RUN, elements - start)
        first = topk_run(tile, frame, elements, kept, start, count, first, run)
        for i in range(np.uintp(count)):
            step(run[i], np.uintp(start) + i, weights, state, factors)


@inlined
def _sweep_segments(step, tile, frame, weights, state, factors):
    """A frame whose segments differ in bits: a segment is decoded in the cache, then stepped."""
    elements = weights.size
    run = np.empty(RUN, np.float32)
    at = (elements + RUN - 1) // RUN  # a level each comes first
    for start in range(0, elements, RUN):
        count = min(RUN, elements - start)
        at = decode_segment(tile, frame, at, start, run[:count], _SET)
        # A skipped segment is a gradient of zero, and not no gradient: momentum and means move on.
        for i in range(np.uintp(count)):
            step(run[i], np.uintp(start) + i, weights, state, factors)


@inlined
def _sweep(step, kind, tile, frame, weights, state, factors):
    """Apply a whole frame: step(gradient, index, weights, state, factors) for each element, in order."""
    if kind == FP32:
        for i in range(np.uintp(weights.size)):
            step(load(frame, 4 * i, np.float32), i, weights, state, factors)
    elif kind == BF16:
        for i in range(np.uintp(weights.size)):
            step(bf16_at(frame, 2 * i), i, weights, state, factors)
    elif kind == TOPK:
        _sweep_runs(step, kind, tile, frame, weights, state, factors)
    elif kind == ADAPTIVE:
        _sweep_segments(step, tile, frame, weights, state, factors)
    else:
        _sweep_codes(step, kind, tile, frame, weights, state, factors)


# --------------------------------------------------------------------- one element, g: gradient


@inlined
def _sgd_step(g, i, weights, state, factors):
    weights[i] -= np.float32(factors[0]) * g


@inlined
def _momentum_step(g, i, weights, state, factors):
    lr, momentum = np.float32(factors[0]), np.float32(factors[1])
    velocity = momentum * state[0][i] + g
    state[0][i] = velocity
    weights[i] -= lr * velocity


@inlined
def _nesterov_step(g, i, weights, state, factors):
    lr, momentum = np.float32(factors[0]), np.float32(factors[1])
    velocity = momentum * state[0][i] + g
    state[0][i] = velocity
    weights[i] -= lr * (g + momentum * velocity)


@inlined
def _adagrad_step(g, i, weights, state, factors):
    lr, epsilon = np.float32(factors[0]), np.float32(factors[1])
    squares = state[0][i] + g * g
    state[0][i] = squares
    weights[i] -= lr * (g / (np.sqrt(squares) + epsilon))


@inlined
def _adam_step(g, i, weights, state, factors):
    lr, root, epsilon = np.float32(factors[0]), np.float32(factors[1]), np.float32(factors[6])
    keep_mean, keep_square = np.float32(factors[2]), np.float32(factors[3])
    new_mean, new_square = np.float32(factors[4]), np.float32(factors[5])
    mean = keep_mean * state[0][i] + new_mean * g
    square = keep_square * state[1][i] + new_square * (g * g)
    state[0][i] = mean
    state[1][i] = square
    weights[i] -= lr * (mean / (np.sqrt(square) * root + epsilon))


@inlined
def _rmsprop_step(g, i, weights, state, factors):
    lr, epsilon = np.float32(factors[0]), np.float32(factors[3])
    keep, new = np.float32(factors[1]), np.float32(factors[2])
    square = keep * state[0][i] + new * (g * g)
    state[0][i] = square
    weights[i] -= lr * (g / (np.sqrt(square) + epsilon))


# ------------------------------------------------------------------- whole frames, g: a gradient


@kernel
def sgd(kind, tile, frame, weights, state, factors):
    """w -= lr g. State: none. Factors: lr."""
    _sweep(_sgd_step, kind, tile, frame, weights, state, factors)


@kernel
def momentum(kind, tile, frame, weights, state, factors):
    """v = momentum v + g; w -= lr v. State: v. Factors: lr, momentum."""
    _sweep(_momentum_step, kind, tile, frame, weights, state, factors)


@kernel
def nesterov(kind, tile, frame, weights, state, factors):
    """v = momentum v + g; w -= lr (g + momentum v). State: v. Factors: lr, momentum."""
    _sweep(_nesterov_step, kind, tile, frame, weights, state, factors)


@kernel
def adagrad(kind, tile, frame, weights, state, factors):
    """s += g^2; w -= lr g / (sqrt(s) + epsilon). State: s. Factors: lr, epsilon."""
    _sweep(_adagrad_step, kind, tile, frame, weights, state, factors)


@kernel
def adam(kind, tile, frame, weights, state, factors):
    """m = b1 m + (1 - b1) g; s = b2 s + (1 - b2) g^2; w -= step m / (sqrt(s) root + epsilon). State: m, s.

    Factors: step = lr / (1 - b1^t), root = 1 / sqrt(1 - b2^t), b1, b2, 1 - b1, 1 - b2, epsilon; t counts this update.
    """
    _sweep(_adam_step, kind, tile, frame, weights, state, factors)


@kernel
def rmsprop(kind, tile, frame, weights, state, factors):
    """s = decay s + (1 - decay) g^2; w -= lr g / (sqrt(s) + epsilon). State: s.

    Factors: lr, decay, 1 - decay, epsilon.
    """
    _sweep(_rmsprop_step, kind, tile, frame, weights, state, factors)
