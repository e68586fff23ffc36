"""The plain torch module: linear layers with an activation between them. `model.safetensors` loads into it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.mlp.arguments import MlpArguments

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class MlpNet(nn.Module):
    """A classifier of `pixels` inputs between 0 and 1 into `classes` classes."""

    def __init__(self, arguments: MlpArguments, pixels: int, classes: int) -> None:
        """Parameters are undefined until `initialise` or `load_state_dict`."""
        super().__init__()
        widths = (pixels, *arguments.hidden, classes)
        self.layers = nn.ModuleList(_Linear(above, below) for above, below in pairwise(widths))
        self.activation: nn.Module = _ACTIVATIONS[arguments.activation]()

    @classmethod
    def from_state(cls, arguments: MlpArguments, state: Mapping[str, Tensor]) -> MlpNet:
        """The module that an exported state dict belongs to. Raises RuntimeError where names or shapes differ."""
        last = f"layers.{len(arguments.hidden)}.weight"
        if last not in state:
            raise RuntimeError(f"a state dict of {len(arguments.hidden)} hidden layers has a {last}; this one has not")
        net = cls(arguments, pixels=state["layers.0.weight"].shape[1], classes=len(state[last]))
        net.load_state_dict(state)
        return net

    def forward(self, images: Tensor) -> Tensor:
        """Logits (images, classes) for images (images, pixels)."""
        *hidden, output = self.layers
        for layer in hidden:
            images = self.activation(layer(images))
        logits: Tensor = output(images)
        return logits

    def initialise(self, seed: int) -> None:
        """Draw all parameters anew from `seed` alone: the same on every machine, whatever torch drew before.

        Weights and biases of a layer are uniform in +-1/sqrt(its inputs), which is torch's default.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in self.layers:
                weight, bias = layer.parameters()
                scale = 1 / math.sqrt(weight.shape[1])
                for parameter in (weight, bias):
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-scale, scale, generator=generator))

    def group_of(self, name: str) -> str:
        """What is pulled together with a parameter: "layers.<number>"."""
        return name.rpartition(".")[0]


class _Linear(nn.Linear):
    """nn.Linear that draws nothing when it is made: `initialise` does."""

    def reset_parameters(self) -> None:
        pass
