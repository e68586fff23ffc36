"""Entropy-coded deltas of one common step: for pulls."""

from paramserver.encoding.coded.member import Coded, round_step
from paramserver.encoding.coded.policy import Moved, StepPolicy

__all__ = ["Coded", "Moved", "StepPolicy", "round_step"]
