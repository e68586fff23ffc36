"""A worker's counters for one job. One thread adds; the control thread reads them for its heartbeats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

MEMORY = 0.95  # of moving averages: about the last twenty steps


@dataclass
class Counters:
    """All grow, but for loss, metrics, residual_norm and in_flight, which say how it is now."""

    steps: int = 0
    finished_examples: float = 0.0
    elements: int = 0
    loss: float = 0.0  # nats an element, moving average
    metrics: Mapping[str, float] = field(default_factory=dict)  # an element, moving averages; replaced, never changed
    skipped_steps: int = 0
    push_bytes: int = 0  # heads included, resent bytes too
    pull_bytes: int = 0
    retries: int = 0
    reconnections: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    residual_norm: float = 0.0
    in_flight: int = 0  # requests without an answer
    waiting_seconds: float = 0.0
    working_seconds: float = 0.0
    device: str = ""

    def saw(self, loss: float, elements: int, sums: Mapping[str, float]) -> None:
        """Count one good step: its mean loss, its elements, and its metrics as sums over them."""
        self.loss = loss if not self.elements else _moved(self.loss, loss)
        means = {name: value / elements for name, value in sums.items() if elements and math.isfinite(value)}
        moved = {name: _moved(self.metrics.get(name, mean), mean) for name, mean in means.items()}
        self.metrics = {**self.metrics, **moved}
        self.elements += elements


def _moved(average: float, value: float) -> float:
    """A moving average after one more value."""
    return MEMORY * average + (1 - MEMORY) * value
