"""A worker's counters for one job. One thread adds; the control thread reads them for its heartbeats."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

LOSS_MEMORY = 0.95  # of the moving average: about the last twenty steps


@dataclass
class Counters:
    """All grow, but for loss, residual_norm and in_flight, which say how it is now."""

    steps: int = 0
    finished_examples: float = 0.0
    elements: int = 0
    loss: float = 0.0  # nats an element, moving average
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

    def saw(self, loss: float, elements: int) -> None:
        """Count one good step."""
        self.loss = loss if not self.elements else LOSS_MEMORY * self.loss + (1 - LOSS_MEMORY) * loss
        self.elements += elements
