"""The optimiser on the worker: its updates, added up, are torch.optim's weights; and what a step may not touch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.task import Parameter
from paramserver.encoding import make_encoding
from paramserver.job import OptimizerSettings
from paramserver.shard.optimizers import make_optimizer
from worker.local_optimizer import LocalOptimizer

STEPS = 30
SHAPES: dict[str, tuple[int, ...]] = {"weight": (17, 9), "bias": (17,), "scale": ()}

SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.1},
    "momentum": {"name": "momentum", "lr": 0.05, "momentum": 0.8},
    "momentum of zero": {"name": "momentum", "lr": 0.05, "momentum": 0.0},
    "nesterov": {"name": "nesterov", "lr": 0.05, "momentum": 0.8},
    "nesterov of zero": {"name": "nesterov", "lr": 0.05, "momentum": 0.0},
    "adagrad": {"name": "adagrad", "lr": 0.1, "epsilon": 1e-6, "initial_accumulator": 0.3},
    "adam": {"name": "adam", "lr": 0.01, "betas": (0.8, 0.99), "epsilon": 1e-6},
    "rmsprop": {"name": "rmsprop", "lr": 0.01, "decay": 0.9, "epsilon": 1e-6},
}


def settings_of(case: str) -> OptimizerSettings:
    return OptimizerSettings.model_validate(SETTINGS[case])


def local(case: str) -> LocalOptimizer:
    return LocalOptimizer(
        settings_of(case), [Parameter(name, torch.ones(shape), "g") for name, shape in SHAPES.items()]
    )


def reference(settings: OptimizerSettings, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    match settings.name:
        case "sgd":
            return torch.optim.SGD(parameters, lr=settings.lr)
        case "momentum":
            return torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum)
        case "nesterov":
            has_momentum = settings.momentum > 0
            return torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum, nesterov=has_momentum)
        case "adagrad":
            start = settings.initial_accumulator
            return torch.optim.Adagrad(
                parameters, lr=settings.lr, eps=settings.epsilon, initial_accumulator_value=start
            )
        case "adam":
            return torch.optim.Adam(parameters, lr=settings.lr, betas=settings.betas, eps=settings.epsilon)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr=settings.lr, alpha=settings.decay, eps=settings.epsilon)


def gradients_at(step: int) -> dict[str, Tensor]:
    """Gradients of all parameters; every third step one of the two without the bias. An element is always zero."""
    generator = torch.Generator().manual_seed(step)
    found = {name: torch.randn(shape, generator=generator) + 0.2 for name, shape in SHAPES.items()}
    found["weight"][3, 3] = 0
    if step % 3 == 1:
        del found["bias"]
    return found


def run(optimizer: LocalOptimizer, steps: range) -> list[dict[str, Tensor]]:
    return [{name: update.clone() for name, update in optimizer.step(gradients_at(step)).items()} for step in steps]


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("case", SETTINGS)
def test_weights_plus_updates_are_the_weights_of_torch(case: str) -> None:
    """Also over steps in which a parameter has no gradient: neither its weights nor its state moves."""
    optimizer = local(case)
    generator = torch.Generator().manual_seed(99)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    start = weights["weight"].clone()
    parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in weights.items()}
    other = reference(settings_of(case), list(parameters.values()))
    for step in range(STEPS):
        gradients = gradients_at(step)
        for name, update in optimizer.step(gradients).items():
            weights[name] += update
        other.zero_grad()
        for name, gradient in gradients.items():
            parameters[name].grad = gradient
        other.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=2e-5, atol=2e-5)
    assert (weights["weight"] - start).abs().max() > 0.05


@pytest.mark.parametrize("case", SETTINGS)
def test_update_is_what_the_shards_optimizer_would_do_to_weights_of_zero(case: str) -> None:
    """One formula on both sides: a job may move its optimiser to the worker and keep its settings."""
    fp32, optimizer = make_encoding("fp32"), local(case)
    shard = make_optimizer(settings_of(case))
    state = shard.state(17)
    bias_steps = [step for step in range(STEPS) if step % 3 != 1]
    for updates_before, step in enumerate(bias_steps):
        gradients, weights = gradients_at(step), np.zeros(17, np.float32)
        update = optimizer.step(gradients)["bias"]
        shard.apply(weights, state, updates_before, fp32, gradients["bias"].numpy().view(np.uint8))
        np.testing.assert_allclose(update.numpy(), weights, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("case", SETTINGS)
def test_gradients_of_the_caller_are_never_changed(case: str) -> None:
    optimizer = local(case)
    for step in range(4):
        gradients = gradients_at(step)
        optimizer.step(gradients)
        assert_same(gradients, gradients_at(step))


@pytest.mark.parametrize("case", SETTINGS)
def test_parameter_without_gradient_gets_no_update_and_keeps_its_state(case: str) -> None:
    optimizer = local(case)
    optimizer.step(gradients_at(0))
    before = optimizer.state_dict()
    updates = optimizer.step(gradients_at(1))
    after = optimizer.state_dict()
    assert updates.keys() == {"weight", "scale"}
    assert_same(before.get("bias", {}), after.get("bias", {}))
    for key, value in before.get("weight", {}).items():
        assert not torch.equal(value, after["weight"][key]), key


@pytest.mark.parametrize("case", SETTINGS)
def test_loaded_state_goes_on_bit_for_bit(case: str) -> None:
    whole, first = local(case), local(case)
    expected = run(whole, range(10))
    run(first, range(5))
    saved = first.state_dict()
    run(first, range(5, 8))  # what is saved does not move with it
    second = local(case)
    run(second, range(3))  # what is loaded replaces what was there
    second.load_state_dict(saved)
    for one, other in zip(run(second, range(5, 10)), expected[5:], strict=True):
        assert_same(one, other)
    third = local(case)
    third.load_state_dict(saved)  # the second has not stepped on the saved tensors
    assert_same(run(third, range(5, 6))[0], expected[5])


def test_parameter_left_out_of_a_loaded_state_starts_afresh() -> None:
    optimizer = local("adam")
    run(optimizer, range(3))
    saved = optimizer.state_dict()
    del saved["bias"]
    optimizer.load_state_dict(saved)
    gradients = gradients_at(3)
    expected = local("adam").step(gradients)["bias"].clone()
    assert torch.equal(optimizer.step(gradients)["bias"], expected)


def test_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    optimizer = local("adam")
    run(optimizer, range(3))
    before = optimizer.state_dict()
    momentum = local("momentum")
    run(momentum, range(1))
    short = {"bias": {**before["bias"], "exp_avg": torch.zeros(16)}}
    broken = {"bias": {**before["bias"], "exp_avg_sq": torch.full((17,), torch.nan)}}
    for state, complaint in (
        (momentum.state_dict(), "'weight' holds momentum_buffer, but 'adam' keeps exp_avg, exp_avg_sq, step"),
        ({"wrong": before["bias"]}, "'wrong': no such parameter"),
        (before | short, r"'exp_avg' of 'bias' has shape \(16,\), not \(17,\)"),
        (before | broken, "'exp_avg_sq' of 'bias' holds NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=complaint):
            optimizer.load_state_dict(state)
    for name, tensors in optimizer.state_dict().items():
        assert_same(tensors, before[name])


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [("wrong", (17,), "no such parameter"), ("bias", (18,), r"the parameter has shape \(17,\)")],
)
def test_foreign_gradient_is_refused_and_moves_no_state(name: str, shape: tuple[int, ...], complaint: str) -> None:
    optimizer = local("momentum")
    run(optimizer, range(2))
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=complaint):
        optimizer.step({"weight": torch.ones(17, 9), name: torch.ones(shape)})
    for kept, tensors in optimizer.state_dict().items():
        assert_same(tensors, before[kept])


def test_gradients_of_any_strides_and_precision_are_taken() -> None:
    gradient = torch.randn(9, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    update = local("adagrad").step({"weight": gradient.t()})["weight"].clone()
    plain = local("adagrad").step({"weight": gradient.t().to(torch.float32).contiguous()})["weight"]
    assert update.is_contiguous()
    assert update.dtype == torch.float32
    assert torch.equal(update, plain)


def test_caller_may_change_the_updates_it_was_given() -> None:
    spoiled, clean = local("adagrad"), local("adagrad")
    for step in range(4):
        updates = spoiled.step(gradients_at(step))
        assert_same(updates, clean.step(gradients_at(step)))
        for update in updates.values():
            update.fill_(1e9)


@pytest.mark.parametrize("case", SETTINGS)
def test_updates_and_state_are_where_the_parameters_are(case: str) -> None:
    """Shown with tensors without memory, so no step may read a value back from the device either."""
    parameters = [Parameter("weight", torch.empty(17, 9, device="meta"), "g")]
    optimizer = LocalOptimizer(settings_of(case), parameters)
    for step in range(2):
        updates = optimizer.step({"weight": gradients_at(step)["weight"]})
        assert updates["weight"].device.type == "meta"
    for key, value in optimizer.state_dict().get("weight", {}).items():
        assert value.device.type == ("cpu" if key == "step" else "meta")
