"""The shard's optimisers against torch.optim, through every encoding; and what a fused pass may not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paramserver.encoding import Encoding, EncodingError, parse_encoding
from paramserver.encoding.base import Bytes, Float32
from paramserver.job import OptimizerSettings
from paramserver.shard import kernels
from paramserver.shard.optimizers import Optimizer, decode_add, make_optimizer, warm_up

torch = pytest.importorskip("torch")

IDENTIFIERS = [
    "fp32",
    "bf16",
    "int8/64",
    "int8/2048",
    "int4/64",
    "fp4/8",
    "int2/64",
    "ternary/64",
    "sign/2048",
    "topk/64",
]
STEPS = 40
ELEMENTS = 5003  # no multiple of a tile or of a vector

SETTINGS = {
    "sgd": {"name": "sgd", "lr": 0.1},
    "momentum": {"name": "momentum", "lr": 0.05, "momentum": 0.8},
    "nesterov": {"name": "nesterov", "lr": 0.05, "momentum": 0.8},
    "adagrad": {"name": "adagrad", "lr": 0.1, "epsilon": 1e-6, "initial_accumulator": 0.3},
    "adam": {"name": "adam", "lr": 0.01, "betas": (0.8, 0.99), "epsilon": 1e-6},
    "rmsprop": {"name": "rmsprop", "lr": 0.01, "decay": 0.9, "epsilon": 1e-6},
}


def torch_optimizer(settings: OptimizerSettings, parameter: Any) -> Any:
    match settings.name:
        case "sgd":
            return torch.optim.SGD([parameter], lr=settings.lr)
        case "momentum" | "nesterov":
            nesterov = settings.name == "nesterov"
            return torch.optim.SGD([parameter], lr=settings.lr, momentum=settings.momentum, nesterov=nesterov)
        case "adagrad":
            initial = settings.initial_accumulator
            return torch.optim.Adagrad(
                [parameter], lr=settings.lr, eps=settings.epsilon, initial_accumulator_value=initial
            )
        case "adam":
            return torch.optim.Adam([parameter], lr=settings.lr, betas=settings.betas, eps=settings.epsilon)
        case _:
            return torch.optim.RMSprop([parameter], lr=settings.lr, alpha=settings.decay, eps=settings.epsilon)


def optimizer_named(name: str) -> Optimizer:
    return make_optimizer(OptimizerSettings.model_validate(SETTINGS[name]))


def gradients(encoding: Encoding, elements: int = ELEMENTS, steps: int = STEPS) -> list[tuple[Bytes, Float32]]:
    """Frames with the values that they hold. Every tenth element is always zero: a unit that never fires."""
    generator = np.random.default_rng(1)
    pairs = []
    for _ in range(steps):
        values = (generator.standard_normal(elements) + 0.2).astype(np.float32)
        values[::10] = 0
        frame, held = np.zeros(encoding.frame_bytes(elements), np.uint8), np.zeros(elements, np.float32)
        encoding.encode(values, frame)
        encoding.decode(frame, held)
        pairs.append((frame, held))
    return pairs


def weights_at_start(elements: int = ELEMENTS) -> Float32:
    return np.random.default_rng(0).standard_normal(elements).astype(np.float32)


@pytest.mark.parametrize("identifier", IDENTIFIERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_optimizer_agrees_with_torch(name: str, identifier: str) -> None:
    settings, encoding = OptimizerSettings.model_validate(SETTINGS[name]), parse_encoding(identifier)
    optimizer, weights = make_optimizer(settings), weights_at_start()
    state = optimizer.state(ELEMENTS)
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    reference = torch_optimizer(settings, parameter)
    for updates_before, (frame, held) in enumerate(gradients(encoding)):
        optimizer.apply(weights, state, updates_before, encoding, frame)
        parameter.grad = torch.from_numpy(held)
        reference.step()
        np.testing.assert_allclose(weights, parameter.detach().numpy(), rtol=2e-5, atol=2e-5)
    assert np.abs(weights - weights_at_start()).max() > 0.1


@pytest.mark.parametrize("name", SETTINGS)
def test_lr_factor_scales_the_step_like_a_smaller_learning_rate(name: str) -> None:
    encoding = parse_encoding("fp32")
    full = optimizer_named(name)
    half = make_optimizer(OptimizerSettings.model_validate(SETTINGS[name] | {"lr": SETTINGS[name]["lr"] * 0.25}))
    damped, smaller = weights_at_start(), weights_at_start()
    damped_state, smaller_state = full.state(ELEMENTS), half.state(ELEMENTS)
    for updates_before, (frame, _) in enumerate(gradients(encoding, steps=5)):
        full.apply(damped, damped_state, updates_before, encoding, frame, 0.25)
        half.apply(smaller, smaller_state, updates_before, encoding, frame)
    np.testing.assert_array_equal(damped, smaller)


@pytest.mark.parametrize("elements", [1, 7, 63, 64, 65, 128, 4097])
@pytest.mark.parametrize("identifier", IDENTIFIERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_element_is_stepped_once_whatever_the_size(name: str, identifier: str, elements: int) -> None:
    encoding, optimizer = parse_encoding(identifier), optimizer_named(name)
    (frame, held), *_ = gradients(encoding, elements, steps=1)
    guard = 5
    arrays = [np.full(elements + 2 * guard, 7, np.float32) for _ in range(1 + optimizer.slots)]
    inner = [array[guard:-guard] for array in arrays]
    for array, start in zip(inner, [weights_at_start(elements), *optimizer.state(elements)], strict=True):
        array[:] = start
    optimizer.apply(inner[0], tuple(inner[1:]), 0, encoding, frame)

    parameter = torch.nn.Parameter(torch.from_numpy(weights_at_start(elements)))
    parameter.grad = torch.from_numpy(held)
    torch_optimizer(OptimizerSettings.model_validate(SETTINGS[name]), parameter).step()
    np.testing.assert_allclose(inner[0], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
    for array in arrays:
        assert (array[:guard] == 7).all()
        assert (array[-guard:] == 7).all()


@pytest.mark.parametrize("identifier", IDENTIFIERS)
def test_unaligned_read_only_frame_gives_identical_weights(identifier: str) -> None:
    encoding, optimizer = parse_encoding(identifier), optimizer_named("adam")
    (frame, _), *_ = gradients(encoding, steps=1)
    results = []
    for source in (frame, np.frombuffer(b"abc" + frame.tobytes(), np.uint8)[3:]):
        weights, state = weights_at_start(), optimizer.state(ELEMENTS)
        optimizer.apply(weights, state, 0, encoding, source)
        results.append(weights.tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("identifier", IDENTIFIERS[1:])
@pytest.mark.parametrize("name", SETTINGS)
def test_fused_pass_equals_decoding_first(name: str, identifier: str) -> None:
    """The same gradient encoded and as the fp32 of its values gives bit-identical weights and state."""
    encoding, plain, optimizer = parse_encoding(identifier), parse_encoding("fp32"), optimizer_named(name)
    fused, apart = weights_at_start(), weights_at_start()
    fused_state, apart_state = optimizer.state(ELEMENTS), optimizer.state(ELEMENTS)
    for updates_before, (frame, held) in enumerate(gradients(encoding, steps=5)):
        optimizer.apply(fused, fused_state, updates_before, encoding, frame)
        optimizer.apply(apart, apart_state, updates_before, plain, held.view(np.uint8))
    np.testing.assert_array_equal(fused, apart)
    for one, other in zip(fused_state, apart_state, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("identifier", IDENTIFIERS)
def test_decode_add_adds_the_values_of_the_frame(identifier: str) -> None:
    encoding, out = parse_encoding(identifier), weights_at_start()
    expected = out.copy()
    for frame, held in gradients(encoding, steps=3):
        decode_add(encoding, frame, out)
        expected += held
    np.testing.assert_array_equal(out, expected)


def test_denormal_and_huge_gradients_leave_adaptive_weights_finite() -> None:
    encoding = parse_encoding("fp32")
    values = np.array([0, 1e-45, -1e-40, 1e-20, 1e15, -1e18], np.float32)
    for name in ("adagrad", "adam", "rmsprop"):
        optimizer, weights = optimizer_named(name), np.zeros(6, np.float32)
        optimizer.apply(weights, optimizer.state(6), 0, encoding, values.view(np.uint8))
        assert np.isfinite(weights).all()
        assert weights[0] == 0


@pytest.mark.parametrize(("name", "slots"), [("sgd", 0), ("momentum", 1), ("adagrad", 1), ("adam", 2), ("rmsprop", 1)])
def test_state_has_slots_arrays_of_the_documented_start(name: str, slots: int) -> None:
    optimizer = optimizer_named(name)
    state = optimizer.state(10)
    assert optimizer.slots == len(state) == slots
    start = 0.3 if name == "adagrad" else 0.0
    for array in state:
        np.testing.assert_array_equal(array, np.full(10, start, np.float32))


def test_frame_of_another_size_changes_nothing() -> None:
    encoding, optimizer, weights = parse_encoding("int8/64"), optimizer_named("momentum"), weights_at_start(100)
    state = optimizer.state(100)
    for size in (encoding.frame_bytes(100) - 1, encoding.frame_bytes(101), 0):
        with pytest.raises(EncodingError) as refusal:
            optimizer.apply(weights, state, 0, encoding, np.ones(size, np.uint8))
        assert refusal.value.code == "wrong-size"
        with pytest.raises(EncodingError):
            decode_add(encoding, np.ones(size, np.uint8), weights)
    np.testing.assert_array_equal(weights, weights_at_start(100))
    assert not state[0].any()


def test_wrong_state_never_reaches_compiled_code() -> None:
    encoding, optimizer, weights = parse_encoding("fp32"), optimizer_named("adam"), weights_at_start(10)
    frame = np.zeros(40, np.uint8)
    with pytest.raises(ValueError, match="keeps 2 arrays of state, was given 1"):
        optimizer.apply(weights, (np.zeros(10, np.float32),), 0, encoding, frame)
    with pytest.raises(ValueError, match="9 elements, it must have 10"):
        optimizer.apply(weights, (np.zeros(10, np.float32), np.zeros(9, np.float32)), 0, encoding, frame)


@pytest.mark.parametrize("name", SETTINGS)
def test_warm_up_compiles_the_one_variant_that_the_hot_path_uses(name: str) -> None:
    optimizer, encodings = optimizer_named(name), [parse_encoding(identifier) for identifier in IDENTIFIERS]
    warm_up(optimizer, encodings)
    for encoding in encodings:
        (frame, _), *_ = gradients(encoding, 100, steps=1)
        optimizer.apply(weights_at_start(100), optimizer.state(100), 5, encoding, frame, 0.5)
        received = np.frombuffer(b"x" + frame.tobytes(), np.uint8)[1:]
        optimizer.apply(weights_at_start(100), optimizer.state(100), 5, encoding, received, 1)
        decode_add(encoding, received, weights_at_start(100))
    kernel = getattr(kernels, name)
    assert len(kernel.signatures) == 1
    assert kernel.targetoptions["nogil"]
    assert not kernel.targetoptions["fastmath"]
