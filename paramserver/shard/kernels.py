"""Compiled kernels of the shard: decode and apply in one pass, run by run, so that a gradient stays in the cache.

Arithmetic is float32 in the order written, without fastmath: the same frames give the same weights. All
factors come in as float32; a plain Python number would turn the loop into float64. Arrays are trusted,
frames checked; weights and state are changed in place. The formulas are those of torch.optim.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding.compiled import kernel
from paramserver.encoding.kernels import RUN, decode_run


@kernel
def decode_add(kind, tile, frame, out):
    """out += decode(frame)"""
    gradient = np.empty(min(RUN, out.size), np.float32)
    for start in range(0, out.size, RUN):
        stop = min(start + RUN, out.size)
        decode_run(kind, tile, frame, out.size, start, stop, gradient)
        total = out[start:stop]
        for i in range(stop - start):
            total[i] += gradient[i]


@kernel
def sgd(kind, tile, frame, weights, lr):
    """w -= lr g"""
    gradient = np.empty(min(RUN, weights.size), np.float32)
    for start in range(0, weights.size, RUN):
        stop = min(start + RUN, weights.size)
        decode_run(kind, tile, frame, weights.size, start, stop, gradient)
        w = weights[start:stop]
        for i in range(stop - start):
            w[i] -= lr * gradient[i]


@kernel
def momentum(kind, tile, frame, weights, velocity, lr, momentum):
    """v = momentum v + g; w -= lr v"""
    gradient = np.empty(min(RUN, weights.size), np.float32)
    for start in range(0, weights.size, RUN):
        stop = min(start + RUN, weights.size)
        decode_run(kind, tile, frame, weights.size, start, stop, gradient)
        w, v = weights[start:stop], velocity[start:stop]
        for i in range(stop - start):
            speed = momentum * v[i] + gradient[i]
            v[i] = speed
            w[i] -= lr * speed


@kernel
def nesterov(kind, tile, frame, weights, velocity, lr, momentum):
    """v = momentum v + g; w -= lr (g + momentum v)"""
    gradient = np.empty(min(RUN, weights.size), np.float32)
    for start in range(0, weights.size, RUN):
        stop = min(start + RUN, weights.size)
        decode_run(kind, tile, frame, weights.size, start, stop, gradient)
        w, v = weights[start:stop], velocity[start:stop]
        for i in range(stop - start):
            speed = momentum * v[i] + gradient[i]
            v[i] = speed
            w[i] -= lr * (gradient[i] + momentum * speed)


@kernel
def adagrad(kind, tile, frame, weights, squares, lr, epsilon):
    """s += g^2; w -= lr g / (sqrt(s) + epsilon)"""
    gradient = np.empty(min(RUN, weights.size), np.float32)
    for start in range(0, weights.size, RUN):
        stop = min(start + RUN, weights.size)
        decode_run(kind, tile, frame, weights.size, start, stop, gradient)
        w, s = weights[start:stop], squares[start:stop]
        for i in range(stop - start):
            total = s[i] + gradient[i] * gradient[i]
            s[i] = total
            w[i] -= lr * (gradient[i] / (np.sqrt(total) + epsilon))


@kernel
def adam(kind, tile, frame, weights, means, squares, step, root, keep, keep_squares, rest, rest_squares, epsilon):
    """m = keep m + rest g; s = keep_squares s + rest_squares g^2; w -= step m / (sqrt(s) root + epsilon)

    `step` is lr / (1 - beta1^t) and `root` 1 / sqrt(1 - beta2^t), t counting this update.
    """
    gradient = np.empty(min(RUN, weights.size), np.float32)
    for start in range(0, weights.size, RUN):
        stop = min(start + RUN, weights.size)
        decode_run(kind, tile, frame, weights.size, start, stop, gradient)
        w, m, s = weights[start:stop], means[start:stop], squares[start:stop]
        for i in range(stop - start):
            mean = keep * m[i] + rest * gradient[i]
            square = keep_squares * s[i] + rest_squares * (gradient[i] * gradient[i])
            m[i] = mean
            s[i] = square
            w[i] -= step * (mean / (np.sqrt(square) * root + epsilon))


@kernel
def rmsprop(kind, tile, frame, weights, squares, lr, keep, rest, epsilon):
    """s = keep s + rest g^2; w -= lr g / (sqrt(s) + epsilon)"""
    gradient = np.empty(min(RUN, weights.size), np.float32)
    for start in range(0, weights.size, RUN):
        stop = min(start + RUN, weights.size)
        decode_run(kind, tile, frame, weights.size, start, stop, gradient)
        w, s = weights[start:stop], squares[start:stop]
        for i in range(stop - start):
            square = keep * s[i] + rest * (gradient[i] * gradient[i])
            s[i] = square
            w[i] -= lr * (gradient[i] / (np.sqrt(square) + epsilon))
