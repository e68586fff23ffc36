"""A recurrent language model as a Task: truncated back-propagation with the state carried inside a segment.

An example is a segment of `windows` windows of the text's stream. A lease of B examples runs as
`windows` batches in order; the carried state starts from zero with the first and never crosses leases.
(Williams & Peng, "An efficient gradient-based algorithm for on-line training of recurrent networks", 1990.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.recurrent.arguments import RecurrentArguments, RecurrentData
from models.recurrent.corpus import NOT_PREDICTED, Corpus, count_segments, cut_segments, load_corpus
from models.recurrent.net import RecurrentNet, State
from models.task import Evaluation, Parameter, Step


class _Carry:
    """What the batches of one lease share: the detached state, and which window comes next."""

    def __init__(self) -> None:
        self.state: State | None = None
        self.next_window = 0


@dataclass(frozen=True)
class Window:
    """One batch: the same window of B segments. Both tensors are (B, window) int64 on the task's device."""

    inputs: Tensor
    targets: Tensor  # NOT_PREDICTED beyond the end of the stream
    elements: int  # targets that count
    index: int  # within the segment, from 0
    carry: _Carry


class RecurrentTask:
    """See models.task.Task. Used from one thread. Values written into the parameters count at once."""

    def __init__(
        self, arguments: RecurrentArguments, data: RecurrentData, corpus: Corpus, seed: int, device: torch.device
    ) -> None:
        self._data = data
        self._corpus = corpus
        self._device = device
        self.net = RecurrentNet(arguments, len(corpus.vocabulary))
        self.net.initialise(seed)
        self.net.to(device)
        self._names, self._tensors = zip(*self.net.named_parameters(), strict=True)

    def parameters(self) -> Sequence[Parameter]:
        return [
            Parameter(name, tensor, self.net.group_of(name))
            for name, tensor in zip(self._names, self._tensors, strict=True)
        ]

    def examples(self, split: str) -> int:
        """Segments of a split. Raises KeyError for a split that is none of train, valid, test."""
        return count_segments(self._corpus.streams[split], self._data.segment, split)

    def batches(self, split: str, examples: Sequence[int]) -> Iterator[Window]:
        """The windows of these segments, in order. Raises IndexError for an example that is not there.

        Windows that lie wholly beyond the end of the stream are left out.
        """
        count = self.examples(split)
        for example in examples:
            if not 0 <= example < count:
                raise IndexError(f"example {example} of split {split!r} does not exist; it has {count}, from 0")
        return self._windows(split, examples)

    def _windows(self, split: str, examples: Sequence[int]) -> Iterator[Window]:
        cut = cut_segments(self._corpus.streams[split], self._data.segment, examples)
        inputs, targets = (torch.from_numpy(part).to(self._device, torch.int64) for part in cut)
        width, carry = self._data.window, _Carry()
        for index in range(self._data.windows):
            here = slice(index * width, (index + 1) * width)
            elements = int((cut[1][:, here] != NOT_PREDICTED).sum())
            if elements:
                yield Window(inputs[:, here], targets[:, here], elements, index, carry)

    def groups(self, batch: Window) -> tuple[str, ...]:
        return ()

    def gradients(self, batch: Window) -> Step:
        """Mean loss and its gradients through one window; the state before it is a constant.

        The gradients are fresh contiguous tensors that belong to the caller. Raises RuntimeError for a
        batch out of its lease's order.
        """
        loss = self._loss_sum(batch) / batch.elements
        gradients = torch.autograd.grad(loss, self._tensors)
        value = loss.item()
        if not math.isfinite(value):
            batch.carry.state = None  # else every later window of the segment would be lost as well
        return Step(value, batch.elements, dict(zip(self._names, gradients, strict=True)))

    @torch.no_grad()
    def evaluate(self, batch: Window) -> Evaluation:
        """Summed loss of one window; the state is carried as in training."""
        return Evaluation(self._loss_sum(batch).item(), batch.elements)

    def export(self) -> Mapping[str, Tensor]:
        """The state dict of `models.recurrent.net.RecurrentNet`, on the CPU; see `RecurrentNet.from_state`."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.net.state_dict().items()}

    def _loss_sum(self, batch: Window) -> Tensor:
        """Summed cross-entropy in nats (); moves the carried state on."""
        carry = batch.carry
        if batch.index != carry.next_window:
            raise RuntimeError(
                f"window {batch.index} was run where window {carry.next_window} of its lease was due: "
                "the batches of a lease are run once each, in order"
            )
        logits, state = self.net(batch.inputs, carry.state)  # (window, B, symbols)
        carry.state = _detached(state)
        carry.next_window += 1
        return F.cross_entropy(
            logits.flatten(0, 1), batch.targets.t().reshape(-1), ignore_index=NOT_PREDICTED, reduction="sum"
        )


def _detached(state: State) -> State:
    return state.detach() if isinstance(state, Tensor) else (state[0].detach(), state[1].detach())


def build(arguments: RecurrentArguments, data: RecurrentData, seed: int, device: torch.device) -> RecurrentTask:
    """The task of a checked job. Raises models.task.DataError where the text is missing or too short."""
    return RecurrentTask(arguments, data, load_corpus(arguments, data), seed, device)
