"""The plain torch module: embedding -> stack of recurrent cells -> output. `model.safetensors` loads into it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.recurrent.arguments import RecurrentArguments

State = Tensor | tuple[Tensor, Tensor]  # (layers, batch, hidden); an LSTM has two

_CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class RecurrentNet(nn.Module):
    """A recurrent language model over `symbols` symbols.

    With `tied` the output layer has only a bias: its weights are the embedding's, so that the state dict
    holds each tensor once (Press & Wolf, "Using the output embedding to improve language models", 2017).
    """

    def __init__(self, arguments: RecurrentArguments, symbols: int) -> None:
        """Parameters are undefined until `initialise` or `load_state_dict`."""
        super().__init__()
        self.arguments = arguments
        self.embedding = nn.Embedding(symbols, arguments.embedding_width)
        # Time first: contiguous steps make the loop about a tenth faster than batch first.
        self.recurrent: nn.RNNBase = _CELLS[arguments.cell](
            arguments.embedding_width, arguments.hidden, num_layers=arguments.layers
        )
        self.output = _Output(arguments.hidden, symbols, has_weight=not arguments.tied)

    @classmethod
    def from_state(cls, arguments: RecurrentArguments, state: Mapping[str, Tensor]) -> RecurrentNet:
        """The module that an exported state dict belongs to. Raises RuntimeError where names or shapes differ."""
        net = cls(arguments, symbols=len(state["embedding.weight"]))
        net.load_state_dict(state)
        return net

    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (window, batch, symbols) and the state after the window, for inputs (batch, window).

        `state` None stands for zeros. Logits are time first, as the cells make them.
        """
        hidden, state = self.recurrent(self.embedding(inputs.t()), state)
        return self.output(hidden, self.embedding.weight), state

    def initialise(self, seed: int) -> None:
        """Draw all parameters anew from `seed` alone: the same on every machine, whatever torch drew before."""
        arguments = self.arguments
        generator = torch.Generator().manual_seed(seed)
        scale = arguments.init_scale or 1 / math.sqrt(arguments.hidden)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                drawn = torch.empty(parameter.shape).uniform_(-scale, scale, generator=generator)
                parameter.copy_(drawn)
                if name.startswith("recurrent.bias_ih") and arguments.cell == "lstm":
                    # torch's gate order is input, forget, cell, output.
                    parameter[arguments.hidden : 2 * arguments.hidden].fill_(arguments.forget_bias)

    def group_of(self, name: str) -> str:
        """What is pulled together with a parameter: "embedding", "recurrent.<layer>" or "output"."""
        part, _, rest = name.partition(".")
        return f"recurrent.{rest.rsplit('_l', 1)[1]}" if part == "recurrent" else part


class _Output(nn.Module):
    """A linear layer on its own weights, or on those of the embedding."""

    def __init__(self, hidden: int, symbols: int, has_weight: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(symbols, hidden)) if has_weight else None
        self.bias = nn.Parameter(torch.empty(symbols))

    def forward(self, hidden: Tensor, shared: Tensor) -> Tensor:
        return F.linear(hidden, shared if self.weight is None else self.weight, self.bias)
