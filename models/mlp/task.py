"""A multi-layer perceptron that classifies images, as a Task.

An example is an image. A lease runs as batches of `batch` images in the lease's order; the last one may have fewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.datasets.images import Images, ImageSplits
from models.mlp.arguments import MlpArguments, MlpData
from models.mlp.data import read_images
from models.mlp.net import MlpNet
from models.task import Evaluation, Parameter, Step


@dataclass(frozen=True)
class ImageBatch:
    """B images, on the task's device."""

    pixels: Tensor  # (B, pixels) float32 between 0 and 1
    labels: Tensor  # (B,) int64


class MlpTask:
    """See models.task.Task. Used from one thread. Values written into the parameters count at once."""

    def __init__(
        self, arguments: MlpArguments, data: MlpData, images: ImageSplits, seed: int, device: torch.device
    ) -> None:
        self._data = data
        self._brightest = images.brightest
        self._splits = {split: _on(getattr(images, split), device) for split in ("train", "valid", "test")}
        self.net = MlpNet(arguments, images.pixels, images.classes)
        self.net.initialise(seed)
        self.net.to(device)
        self._names, self._tensors = zip(*self.net.named_parameters(), strict=True)

    def parameters(self) -> Sequence[Parameter]:
        return [
            Parameter(name, tensor, self.net.group_of(name))
            for name, tensor in zip(self._names, self._tensors, strict=True)
        ]

    def examples(self, split: str) -> int:
        """Images of a split. Raises KeyError for a split that is none of train, valid, test."""
        return len(self._splits[split][1])

    def batches(self, split: str, examples: Sequence[int]) -> Iterator[ImageBatch]:
        """These images in order, `batch` at a time. Raises IndexError for an example that is not there."""
        count = self.examples(split)
        for example in examples:
            if not 0 <= example < count:
                raise IndexError(f"example {example} of split {split!r} does not exist; it has {count}, from 0")
        return self._batches(split, examples)

    def _batches(self, split: str, examples: Sequence[int]) -> Iterator[ImageBatch]:
        pixels, labels = self._splits[split]
        chosen = torch.tensor(examples, dtype=torch.int64, device=labels.device)
        for start in range(0, len(chosen), self._data.batch):
            here = chosen[start : start + self._data.batch]
            yield ImageBatch(pixels[here].float().div_(self._brightest), labels[here].long())

    def groups(self, batch: ImageBatch) -> tuple[str, ...]:
        return ()

    def gradients(self, batch: ImageBatch) -> Step:
        """Mean cross-entropy and its gradients; the metric "accuracy" is the number of images that were right.

        The gradients are fresh contiguous tensors that belong to the caller.
        """
        logits = self.net(batch.pixels)
        loss = F.cross_entropy(logits, batch.labels)
        gradients = torch.autograd.grad(loss, self._tensors)
        named = dict(zip(self._names, gradients, strict=True))
        return Step(loss.item(), len(batch.labels), named, {"accuracy": _right(logits, batch)})

    @torch.no_grad()
    def evaluate(self, batch: ImageBatch) -> Evaluation:
        """Summed cross-entropy; the metric "accuracy" is the number of images that were right."""
        logits = self.net(batch.pixels)
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        return Evaluation(loss.item(), len(batch.labels), {"accuracy": _right(logits, batch)})

    def export(self) -> Mapping[str, Tensor]:
        """The state dict of `models.mlp.net.MlpNet`, on the CPU; see `MlpNet.from_state`."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.net.state_dict().items()}


def _right(logits: Tensor, batch: ImageBatch) -> float:
    """Images whose class has the largest logit."""
    return float((logits.argmax(1) == batch.labels).sum())


def _on(images: Images, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels (images, pixels) and labels (images,), both uint8: a batch is made float, not the whole split."""
    pixels = torch.from_numpy(images.pixels.copy()).flatten(1)
    return pixels.to(device), torch.from_numpy(images.labels.copy()).to(device)


def build(arguments: MlpArguments, data: MlpData, seed: int, device: torch.device) -> MlpTask:
    """The task of a checked job. Raises models.task.DataError where the images are missing or damaged."""
    return MlpTask(arguments, data, read_images(data), seed, device)
