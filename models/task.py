"""The Task interface: what a model family offers to the worker. It knows torch, and nothing of the network.

The worker never assumes back-propagation: a task says which parameters it has, turns a batch into
gradients, and evaluates. Contrastive divergence or REINFORCE fit as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from models.datasets.errors import DataError as DataError


@dataclass(frozen=True)
class Parameter:
    """A live tensor of the model. `group` is what is pulled together: one layer, one expert."""

    name: str
    tensor: Tensor
    group: str


@dataclass(frozen=True)
class Step:
    """What one batch gave. `gradients` are summed as the loss is averaged: d loss / d parameter."""

    loss: float  # mean over elements, nats
    elements: int  # predicted symbols
    gradients: Mapping[str, Tensor]  # by parameter name; shapes as the parameters'
    metrics: Mapping[str, float] = field(default_factory=dict)  # sums over elements; people see the means
    triggered: tuple[str, ...] = ()  # groups that the batch used


@dataclass(frozen=True)
class Evaluation:
    loss_sum: float  # nats
    elements: int
    metrics: Mapping[str, float] = field(default_factory=dict)  # sums over elements


Batch = Any  # a task's own; the worker only hands it back


class Task(Protocol):
    def parameters(self) -> Sequence[Parameter]:
        """The trained tensors in layout order, each storage once. The worker writes pulled values into them."""
        ...

    def examples(self, split: str) -> int:
        """How many examples "train", "valid" or "test" has. Example ids run from 0."""
        ...

    def batches(self, split: str, examples: Sequence[int]) -> Iterator[Batch]:
        """The batches of one lease, in the order in which they must be run.

        For recurrent tasks an example is a stream segment of k windows: B examples give k batches, and
        the carried state starts from zero with the first.
        """
        ...

    def groups(self, batch: Batch) -> tuple[str, ...]:
        """The groups that must be fresh for this batch; () means all of them."""
        ...

    def gradients(self, batch: Batch) -> Step:
        """Loss and gradients at the present parameters. May return a loss that is not finite: the worker checks."""
        ...

    def evaluate(self, batch: Batch) -> Evaluation: ...

    def export(self) -> Mapping[str, Tensor]:
        """The state dict that loads into the plain torch module."""
        ...
