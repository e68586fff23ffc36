"""Pushes whose segments differ in bits, and the policy that decides which gets how many."""

from paramserver.encoding.adaptive.member import Adaptive
from paramserver.encoding.adaptive.policy import BitPolicy, Part, Plan, WireLimit

__all__ = ["Adaptive", "BitPolicy", "Part", "Plan", "WireLimit"]
