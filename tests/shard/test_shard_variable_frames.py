"""Updates whose frames have no fixed size step the weights exactly as their values do at full precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paramserver.encoding import EncodingError, make_encoding, parse_encoding
from paramserver.encoding.adaptive import Adaptive
from paramserver.encoding.adaptive.constants import LEVELS, segments_of
from paramserver.encoding.base import Bytes, Encoding, Float32
from paramserver.job import OptimizerSettings
from paramserver.shard.optimizers import decode_add, make_optimizer, warm_up

SIZES = [1, 2048, 5003, 70_001]
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.05, "momentum": 0.8},
    "nesterov": {"lr": 0.05, "momentum": 0.8},
    "adagrad": {"lr": 0.1},
    "adam": {"lr": 0.01},
    "rmsprop": {"lr": 0.01},
}
fp32 = make_encoding("fp32")


def normal(elements: int, seed: int) -> Float32:
    return np.random.default_rng(seed).standard_normal(elements).astype(np.float32)


def frame_of(encoding: Encoding, elements: int, seed: int) -> tuple[Bytes, Float32]:
    """A frame, for adaptive of segments at every level, and the values that it holds."""
    if isinstance(encoding, Adaptive):
        levels = ((np.arange(segments_of(elements)) + seed) % LEVELS).astype(np.uint8)
        frame = np.empty(encoding.bytes_at(levels, elements), np.uint8)
        encoding.encode_levels(levels, normal(elements, seed), frame, np.zeros(elements, np.float32))
    else:
        frame = np.empty(encoding.frame_bytes(elements), np.uint8)
        frame = frame[: encoding.encode(normal(elements, seed), frame)]
    values = np.empty(elements, np.float32)
    encoding.decode(frame, values)
    return frame, values


@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("identifier", ["adaptive/64", "adaptive/16", "adaptive/2048", "coded"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_frame_steps_as_its_values_do(name: str, identifier: str, elements: int) -> None:
    optimizer = make_optimizer(OptimizerSettings.model_validate({"name": name} | SETTINGS[name]))
    encoding = parse_encoding(identifier)
    weights = normal(elements, 0)
    expected, state, expected_state = weights.copy(), optimizer.state(elements), optimizer.state(elements)
    for step in range(6):
        frame, values = frame_of(encoding, elements, step)
        optimizer.apply(weights, state, step, encoding, frame)
        optimizer.apply(expected, expected_state, step, fp32, values.view(np.uint8))
    np.testing.assert_array_equal(weights, expected)
    for one, other in zip(state, expected_state, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("identifier", ["adaptive/64", "coded"])
def test_a_delta_is_added_as_the_encoding_adds_it(identifier: str) -> None:
    encoding = parse_encoding(identifier)
    frame, values = frame_of(encoding, 5003, 1)
    out = normal(5003, 2)
    expected = out + values
    decode_add(encoding, frame, out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("identifier", ["adaptive/64", "coded"])
def test_a_frame_of_another_size_changes_nothing(identifier: str) -> None:
    encoding, optimizer = parse_encoding(identifier), make_optimizer(OptimizerSettings(name="sgd", lr=0.1))
    warm_up(optimizer, [encoding])
    weights = normal(5003, 0)
    before = weights.copy()
    for frame in (frame_of(encoding, 5003, 1)[0][:-3], frame_of(encoding, 9000, 1)[0]):
        with pytest.raises(EncodingError):
            optimizer.apply(weights, (), 0, encoding, frame)
    np.testing.assert_array_equal(weights, before)
