"""What an encoding lost, kept per block and added to the next update of that block (error feedback).

Source: Seide et al. 2014, "1-Bit Stochastic Gradient Descent". Used from one thread.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from paramserver.encoding import aligned_zeros
from paramserver.protocol.layout import Layout

Float32 = npt.NDArray[np.float32]


class ResidualStore:
    """One float32 residual a block, made when it is first needed."""

    def __init__(self, layout: Layout) -> None:
        self._elements = [block.elements for block in layout.blocks]
        self._residuals: dict[int, Float32] = {}

    def of(self, block: int) -> Float32:
        """The live residual (elements,) of a block; an encoder changes it in place."""
        residual = self._residuals.get(block)
        if residual is None:
            residual = self._residuals[block] = aligned_zeros(self._elements[block], place=1)
        return residual

    def find(self, block: int) -> Float32 | None:
        """The live residual, or None where nothing was ever lost: a lossless encoder needs none."""
        return self._residuals.get(block)

    def take_back(self, block: int, values: Float32) -> bool:
        """Add a finally refused update (elements,) to the residual. False, and no change, if it is not finite."""
        restored = self.of(block) + values
        if not np.isfinite(restored).all():
            return False
        self._residuals[block] = restored
        return True

    def blocks(self) -> list[int]:
        """The blocks that hold something back."""
        return sorted(block for block, residual in self._residuals.items() if residual.any())

    def clear(self, block: int) -> None:
        """Forget a residual that went out whole."""
        self._residuals.pop(block, None)

    def norm(self) -> float:
        """The Euclidean norm over all blocks."""
        return math.sqrt(sum(float(np.dot(residual, residual)) for residual in self._residuals.values()))
