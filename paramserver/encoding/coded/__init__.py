"""Entropy-coded deltas of one common step: for pulls."""

from paramserver.encoding.coded.member import RELATIVE_STEP, Coded, round_step
from paramserver.encoding.coded.policy import Moved, StepPolicy, warm_up

__all__ = ["RELATIVE_STEP", "Coded", "Moved", "StepPolicy", "round_step", "warm_up"]
