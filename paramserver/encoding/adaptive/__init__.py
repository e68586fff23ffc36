"""Pushes whose segments differ in bits, and the policy that decides which gets how many."""

from paramserver.encoding.adaptive.member import DEFAULT_ERROR_LIMIT, Adaptive
from paramserver.encoding.adaptive.policy import BitPolicy, Part, Plan
from paramserver.encoding.adaptive.wire import WireLimit

__all__ = ["DEFAULT_ERROR_LIMIT", "Adaptive", "BitPolicy", "Part", "Plan", "WireLimit"]
