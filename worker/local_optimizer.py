"""The optimiser on the worker (`optimizer.where: worker`): gradients in, updates out, which the shard only adds.

Encodings of two bits and less lose what an adaptive optimiser on the shard would need; an update that is
preconditioned here, with this worker's own state, and then encoded with its residual keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.task import Parameter
from paramserver.job import OptimizerSettings

State = dict[str, dict[str, Tensor]]  # by parameter name, then by torch.optim's name of the state tensor

# What torch.optim keeps of a parameter; "step" has no dimension, all else the parameter's shape.
_KEPT: dict[str, frozenset[str]] = {
    "sgd": frozenset(),
    "momentum": frozenset({"momentum_buffer"}),
    "nesterov": frozenset({"momentum_buffer"}),
    "adagrad": frozenset({"step", "sum"}),
    "adam": frozenset({"step", "exp_avg", "exp_avg_sq"}),
    "rmsprop": frozenset({"step", "square_avg"}),
}


class LocalOptimizer:
    """torch.optim on shadow parameters that are zero before each step, so that after it they are the update.

    Formulas, defaults and settings are those of the shard's optimisers. It takes one copy of the parameters in
    memory, and the optimiser's state, on the parameters' devices. Used from one thread.

    Args:
        parameters: float32 of any device; only their names, shapes and devices are used, never their values.
    """

    def __init__(self, settings: OptimizerSettings, parameters: Sequence[Parameter]) -> None:
        self._settings = settings
        self._shadows = {
            parameter.name: torch.zeros(parameter.tensor.shape, dtype=torch.float32, device=parameter.tensor.device)
            for parameter in parameters
        }
        self._optimizer = self._fresh()

    def step(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The updates, by parameter name, that gradients by name give: what is added to the weights.

        The gradients are not changed. A parameter without a gradient gets no update, and its state does not move.
        The updates are views of the shadows: valid, and the caller's to change, until the next call.
        Raises ValueError for a name or shape that is not ours; no state has moved then.
        """
        checked = {name: self._checked(name, gradient) for name, gradient in gradients.items()}
        with torch.no_grad():
            for name, gradient in checked.items():
                self._shadows[name].zero_()
                self._shadows[name].grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {name: self._shadows[name] for name in checked}

    def state_dict(self) -> State:
        """A copy of the state, by parameter name; a parameter that has none yet is left out."""
        state: State = {}
        for name, shadow in self._shadows.items():
            kept = self._optimizer.state.get(shadow, {})
            tensors = {key: value.clone() for key, value in kept.items() if isinstance(value, Tensor)}
            if tensors:
                state[name] = tensors
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from a state that `state_dict` gave, of any device; a parameter left out starts afresh.

        Raises ValueError for a state of another model or optimiser, and one that is not finite; nothing has changed
        then.
        """
        for name, tensors in state.items():
            self._check_state(name, tensors)
        fresh = self._fresh()
        for name, tensors in state.items():
            shadow = self._shadows[name]
            # torch.optim keeps step counts on the CPU: reading one there waits for no device.
            fresh.state[shadow] = {
                key: value.detach().to("cpu" if key == "step" else shadow.device, torch.float32, copy=True)
                for key, value in tensors.items()
            }
        self._optimizer = fresh

    def _fresh(self) -> torch.optim.Optimizer:
        settings, shadows = self._settings, list(self._shadows.values())
        # Not foreach: its Nesterov step adds the velocity to the gradients, which are the caller's.
        match settings.name:
            case "sgd":
                return torch.optim.SGD(shadows, lr=settings.lr, foreach=False)
            case "momentum" | "nesterov":
                return torch.optim.SGD(
                    shadows,
                    lr=settings.lr,
                    momentum=settings.momentum,
                    # Without momentum the two are one, and torch refuses to call it Nesterov's.
                    nesterov=settings.name == "nesterov" and settings.momentum > 0,
                    foreach=False,
                )
            case "adagrad":
                return torch.optim.Adagrad(
                    shadows,
                    lr=settings.lr,
                    eps=settings.epsilon,
                    initial_accumulator_value=settings.initial_accumulator,
                    foreach=False,
                )
            case "adam":
                return torch.optim.Adam(
                    shadows, lr=settings.lr, betas=settings.betas, eps=settings.epsilon, foreach=False
                )
            case "rmsprop":
                return torch.optim.RMSprop(
                    shadows, lr=settings.lr, alpha=settings.decay, eps=settings.epsilon, foreach=False
                )

    def _checked(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient on its shadow's device as float32: itself where it is that already."""
        shadow = self._shadows.get(name)
        if shadow is None or shadow.shape != gradient.shape:
            found = "no such parameter" if shadow is None else f"the parameter has shape {tuple(shadow.shape)}"
            raise ValueError(f"gradient {name!r} of shape {tuple(gradient.shape)}: {found}")
        return gradient.detach().to(shadow.device, torch.float32)

    def _check_state(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        shadow = self._shadows.get(name)
        if shadow is None:
            raise ValueError(f"optimiser state of {name!r}: no such parameter; it belongs to another model")
        kept = _KEPT[self._settings.name]
        if "momentum_buffer" in kept and self._settings.momentum == 0:
            kept = frozenset()  # torch.optim.SGD keeps no velocity then
        if tensors.keys() != kept:
            raise ValueError(
                f"optimiser state of {name!r} holds {', '.join(sorted(tensors)) or 'nothing'}, but "
                f"{self._settings.name!r} keeps {', '.join(sorted(kept)) or 'nothing'}; it belongs to another optimizer"
            )
        for key, value in tensors.items():
            shape = () if key == "step" else tuple(shadow.shape)
            if tuple(value.shape) != shape:
                raise ValueError(f"optimiser state {key!r} of {name!r} has shape {tuple(value.shape)}, not {shape}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"optimiser state {key!r} of {name!r} holds NaN or infinity; start without it")
