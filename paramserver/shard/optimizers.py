"""The optimisers that a shard runs: one class each over one fused kernel. Formulas and defaults follow torch.optim.

They hold settings only; a block's state lies with the block. No thread, clock or I/O: two threads may
apply to different blocks at once, and the kernels run without the GIL.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

import numpy as np

from paramserver.encoding import Encoding, aligned_zeros, make_encoding
from paramserver.encoding import warm_up as warm_up_encoding
from paramserver.encoding.base import Bytes, Float32
from paramserver.encoding.frames import expect_float32
from paramserver.job import OptimizerSettings
from paramserver.shard import kernels

State = tuple[Float32, ...]


class Optimizer(ABC):
    """How an update changes a block's weights. `slots` is how many float32 of state an element needs."""

    slots: ClassVar[int]
    _kernel: ClassVar[Callable[..., None]]

    def __init__(self, settings: OptimizerSettings) -> None:
        self._settings = settings

    def state(self, elements: int) -> State:
        """Fresh state of a block, owned by the caller: `slots` arrays (elements,)."""
        return tuple(aligned_zeros(elements, place=1 + slot) for slot in range(self.slots))  # the weights have place 0

    def apply(
        self,
        weights: Float32,
        state: State,
        updates_before: int,
        encoding: Encoding,
        frame: Bytes,
        lr_factor: float = 1.0,
    ) -> None:
        """Decode a gradient and take one step, changing `weights` (n,) and `state` in place.

        The frame must have passed `encoding.check`; it may be read-only and unaligned. `updates_before` is
        how many updates this block applied before this one; `lr_factor` multiplies the learning rate.
        Raises EncodingError("wrong-size") for a frame of another block's size, changing nothing.
        """
        expect_float32(weights, "weights")
        if len(state) != self.slots:
            raise ValueError(f"{type(self).__name__} keeps {self.slots} arrays of state, was given {len(state)}")
        for array in state:
            expect_float32(array, "optimiser state", weights.size)
        encoding, frame = _fused(encoding, frame, weights.size)
        factors = self._factors(updates_before, float(lr_factor))
        self._kernel(encoding.kind, encoding.tile, frame, weights, state, factors)

    @abstractmethod
    def _factors(self, updates_before: int, lr_factor: float) -> tuple[float, ...]:
        """This step's factors, in the order that the kernel lists them."""


class Sgd(Optimizer):
    slots = 0
    _kernel = staticmethod(kernels.sgd)

    def _factors(self, updates_before: int, lr_factor: float) -> tuple[float, ...]:
        return (self._settings.lr * lr_factor,)


class Add(Optimizer):
    """`where: worker`: the update is already what the weights change by; a worker's own optimiser made it."""

    slots = 0
    _kernel = staticmethod(kernels.sgd)

    def _factors(self, updates_before: int, lr_factor: float) -> tuple[float, ...]:
        return (-lr_factor,)


class Momentum(Optimizer):
    """Heavy ball, without dampening: torch.optim.SGD(momentum=...). State: velocity."""

    slots = 1
    _kernel = staticmethod(kernels.momentum)

    def _factors(self, updates_before: int, lr_factor: float) -> tuple[float, ...]:
        return self._settings.lr * lr_factor, self._settings.momentum


class Nesterov(Momentum):
    """torch.optim.SGD(momentum=..., nesterov=True). State: velocity."""

    _kernel = staticmethod(kernels.nesterov)


class Adagrad(Optimizer):
    """Duchi et al. 2011, torch.optim.Adagrad. State: sum of squares, from initial_accumulator."""

    slots = 1
    _kernel = staticmethod(kernels.adagrad)

    def state(self, elements: int) -> State:
        squares = aligned_zeros(elements, place=1)
        squares[:] = self._settings.initial_accumulator
        return (squares,)

    def _factors(self, updates_before: int, lr_factor: float) -> tuple[float, ...]:
        return self._settings.lr * lr_factor, self._settings.epsilon


class Adam(Optimizer):
    """Kingma and Ba 2015, torch.optim.Adam. State: mean, mean square. Bias correction counts the block's updates."""

    slots = 2
    _kernel = staticmethod(kernels.adam)

    def _factors(self, updates_before: int, lr_factor: float) -> tuple[float, ...]:
        beta1, beta2 = self._settings.betas
        step = self._settings.lr * lr_factor / (1 - beta1 ** (updates_before + 1))
        root = 1 / math.sqrt(1 - beta2 ** (updates_before + 1))
        return step, root, beta1, beta2, 1 - beta1, 1 - beta2, self._settings.epsilon


class Rmsprop(Optimizer):
    """Hinton 2012, torch.optim.RMSprop. State: mean square."""

    slots = 1
    _kernel = staticmethod(kernels.rmsprop)

    def _factors(self, updates_before: int, lr_factor: float) -> tuple[float, ...]:
        decay = self._settings.decay
        return self._settings.lr * lr_factor, decay, 1 - decay, self._settings.epsilon


_MEMBERS: dict[str, type[Optimizer]] = {
    "sgd": Sgd,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adagrad": Adagrad,
    "adam": Adam,
    "rmsprop": Rmsprop,
}


def make_optimizer(settings: OptimizerSettings) -> Optimizer:
    """What the shard does with an update: the named optimiser's step, or adding where the worker makes the step."""
    return Add(settings) if settings.where == "worker" else _MEMBERS[settings.name](settings)


def decode_add(encoding: Encoding, frame: Bytes, out: Float32) -> None:
    """out (n,) += the values of a checked frame, in one pass."""
    encoding.decode_add(frame, out)


def warm_up(optimizer: Optimizer, encodings: Iterable[Encoding]) -> None:
    """Compile, or load from the disk cache, all that the hot path calls, so that the first push pays nothing."""
    for encoding in encodings:
        warm_up_encoding(encoding)
        weights, frame = np.zeros(3, np.float32), np.empty(encoding.frame_bytes(3), np.uint8)
        frame = frame[: encoding.encode(weights, frame)]
        optimizer.apply(weights, optimizer.state(3), 0, encoding, frame)
        decode_add(encoding, frame, weights)


def _fused(encoding: Encoding, frame: Bytes, elements: int) -> tuple[Encoding, Bytes]:
    """The sized frame, or its values as a frame of fp32 where no kernel steps while it decodes."""
    if encoding.is_fused:
        return encoding, encoding.sized(frame, elements)
    values = np.empty(elements, np.float32)
    encoding.decode(frame, values)
    fp32 = make_encoding("fp32")
    return fp32, fp32.sized(values.view(np.uint8), elements)
