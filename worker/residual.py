"""What an encoding lost, kept per block and added to the next update of that block (error feedback).

A residual lives where its block is encoded: in an array of the host, or in a tensor of a device.
Source: Seide et al. 2014, "1-Bit Stochastic Gradient Descent". Used from one thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from paramserver.encoding import aligned_zeros
from paramserver.protocol.layout import Layout

Float32 = npt.NDArray[np.float32]
Residual = Float32 | Tensor


class ResidualStore:
    """One float32 residual a block, made when it is first needed.

    Args:
        devices: of the blocks whose residual is a tensor there; those of all others are arrays of the host.
    """

    def __init__(self, layout: Layout, devices: Mapping[int, torch.device] | None = None) -> None:
        self._elements = [block.elements for block in layout.blocks]
        self._devices = devices or {}
        self._residuals: dict[int, Residual] = {}

    def of(self, block: int) -> Residual:
        """The live residual (elements,) of a block; an encoder changes it in place."""
        residual = self._residuals.get(block)
        if residual is None:
            residual = self._residuals[block] = self._zeros(block)
        return residual

    def find(self, block: int) -> Residual | None:
        """The live residual, or None where nothing was ever lost: a lossless encoder needs none."""
        return self._residuals.get(block)

    def copy(self, block: int) -> Tensor:
        """A copy (elements,) on the host of what a block holds back."""
        residual = self.of(block)
        return residual.detach().cpu().clone() if isinstance(residual, Tensor) else torch.from_numpy(residual.copy())

    def take_back(self, block: int, values: Float32) -> bool:
        """Add a finally refused update (elements,) to the residual. False, and no change, if it is not finite."""
        residual = self.of(block)
        restored: Residual
        if isinstance(residual, Tensor):
            restored = residual + torch.from_numpy(values).to(residual.device)
            is_finite = bool(torch.isfinite(restored).all())
        else:
            restored = residual + values
            is_finite = bool(np.isfinite(restored).all())
        if is_finite:
            self._residuals[block] = restored
        return is_finite

    def blocks(self) -> list[int]:
        """The blocks that hold something back."""
        return sorted(block for block, residual in self._residuals.items() if residual.any())

    def clear(self, block: int) -> None:
        """Forget a residual that went out whole."""
        self._residuals.pop(block, None)

    def norm(self) -> float:
        """The Euclidean norm over all blocks."""
        # All products are queued before the first one is read, so that a device is waited for once.
        squares = [_square(residual) for residual in self._residuals.values()]
        return math.sqrt(sum(float(square) for square in squares))

    def _zeros(self, block: int) -> Residual:
        device = self._devices.get(block)
        if device is None:
            return aligned_zeros(self._elements[block], place=1)
        return torch.zeros(self._elements[block], dtype=torch.float32, device=device)


def _square(residual: Residual) -> np.float32 | Tensor:
    """The sum of squares, on the residual's device."""
    if isinstance(residual, Tensor):
        return torch.dot(residual, residual)
    return np.float32(np.dot(residual, residual))
