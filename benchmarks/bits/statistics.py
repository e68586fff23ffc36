"""Means of paired gaps with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95% points of Student's t by degrees of freedom; beyond the table that of the normal distribution is close.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
NORMAL_95 = 1.960


@dataclass(frozen=True)
class Gap:
    """The mean of relative differences in percent, and half the width of its 95% interval: None of one pair."""

    mean: float
    half_width: float | None

    def __str__(self) -> str:
        return f"{self.mean:+.2f}%" + ("" if self.half_width is None else f" ±{self.half_width:.2f}")


def paired_gap(values: Sequence[float], references: Sequence[float]) -> Gap:
    """How far each value lies above its own reference."""
    gaps = [100 * (value / reference - 1) for value, reference in zip(values, references, strict=True)]
    mean = math.fsum(gaps) / len(gaps)
    if len(gaps) == 1:
        return Gap(mean, None)
    variance = math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
    freedom = len(gaps) - 1
    critical = T_95[freedom - 1] if freedom <= len(T_95) else NORMAL_95
    return Gap(mean, critical * math.sqrt(variance / len(gaps)))
