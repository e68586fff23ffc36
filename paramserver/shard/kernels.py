"""Compiled kernels of the shard: each decodes an element and applies it in the same loop, so memory is passed once.

An optimiser is a step for one element; `_sweep` runs it over a block in a loop for each kind of frame, and
all of it is inlined. Arithmetic is float32 in the order written, without fastmath: the same frames give the
same weights. Factors come in as float32; a plain Python number would turn the loop into float64. Arrays are
trusted, frames checked; weights and state are changed in place. The formulas are those of torch.optim.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding.compiled import inlined, kernel
from paramserver.encoding.kernels import BF16, FP32, INT8, WIDTH, load, reinterpret


@inlined
def _gradient_at(kind, frame, codes, i, scale):
    """Element i of the part whose codes begin at byte `codes`; `scale` is read for int8 only."""
    if kind == INT8:
        return np.float32(load(frame, codes + i, np.int8)) * scale
    if kind == BF16:
        bits = np.uint32(load(frame, codes + 2 * i, np.uint16)) << np.uint32(16)
        return reinterpret(np.uint32(bits), np.float32)
    return load(frame, codes + 4 * i, np.float32)


@inlined
def _part(step, kind, frame, codes, scale, start, count, weights, state, factors):
    """Apply elements [start, start + count). With `kind` and `count` constant the loop vectorises without a rest."""
    for i in range(count):
        # An unsigned index spares the test for a negative one.
        step(_gradient_at(kind, frame, codes, i, scale), np.uintp(start + i), weights, state, factors)


@inlined
def _sweep(step, kind, tile, frame, weights, state, factors):
    """Apply a whole frame: step(gradient, index, weights, state, factors) for each element, in order."""
    elements = weights.size
    unscaled = np.float32(1)
    if kind == FP32:
        _part(step, FP32, frame, 0, unscaled, 0, elements, weights, state, factors)
    elif kind == BF16:
        _part(step, BF16, frame, 0, unscaled, 0, elements, weights, state, factors)
    else:
        tiles = (elements + tile - 1) // tile
        usual = elements // WIDTH if tile == WIDTH else 0
        for index in range(usual):
            start = index * WIDTH
            scale = load(frame, 4 * index, np.float32)
            _part(step, INT8, frame, 4 * tiles + start, scale, start, WIDTH, weights, state, factors)
        for index in range(usual, tiles):
            start = index * tile
            scale = load(frame, 4 * index, np.float32)
            count = min(tile, elements - start)
            _part(step, INT8, frame, 4 * tiles + start, scale, start, count, weights, state, factors)


# --------------------------------------------------------------------- one element, g: gradient


@inlined
def _add_step(g, i, weights, state, factors):
    weights[i] += g


@inlined
def _sgd_step(g, i, weights, state, factors):
    weights[i] -= factors[0] * g


@inlined
def _momentum_step(g, i, weights, state, factors):
    lr, momentum = factors
    velocity = momentum * state[0][i] + g
    state[0][i] = velocity
    weights[i] -= lr * velocity


@inlined
def _nesterov_step(g, i, weights, state, factors):
    lr, momentum = factors
    velocity = momentum * state[0][i] + g
    state[0][i] = velocity
    weights[i] -= lr * (g + momentum * velocity)


@inlined
def _adagrad_step(g, i, weights, state, factors):
    lr, epsilon = factors
    squares = state[0][i] + g * g
    state[0][i] = squares
    weights[i] -= lr * (g / (np.sqrt(squares) + epsilon))


@inlined
def _adam_step(g, i, weights, state, factors):
    lr, root, keep_mean, keep_square, new_mean, new_square, epsilon = factors
    mean = keep_mean * state[0][i] + new_mean * g
    square = keep_square * state[1][i] + new_square * (g * g)
    state[0][i] = mean
    state[1][i] = square
    weights[i] -= lr * (mean / (np.sqrt(square) * root + epsilon))


@inlined
def _rmsprop_step(g, i, weights, state, factors):
    lr, keep, new, epsilon = factors
    square = keep * state[0][i] + new * (g * g)
    state[0][i] = square
    weights[i] -= lr * (g / (np.sqrt(square) + epsilon))


# ------------------------------------------------------------------- whole frames, g: a gradient


@kernel
def decode_add(kind, tile, frame, out):
    """out += g"""
    _sweep(_add_step, kind, tile, frame, out, (), ())


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
