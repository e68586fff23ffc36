"""Stochastic rounding: right on average, the same for the same seed, and never more than one code away."""

from __future__ import annotations

import numpy as np
import pytest

from paramserver.encoding import EncodingError, EncodingOptions, make_encoding
from paramserver.encoding.base import Bytes, Encoding, Float32

NAMES = ["int8", "int4", "fp4", "int2"]


def stochastic(name: str) -> Encoding:
    return make_encoding(name, EncodingOptions(rounding="stochastic"))


def sent(encoding: Encoding, values: Float32, seed: int) -> tuple[Bytes, Float32, Float32]:
    """The frame, its values and the residual."""
    frame, received = np.zeros(encoding.frame_bytes(values.size), np.uint8), np.zeros_like(values)
    residual = np.zeros_like(values)
    encoding.encode(values, frame, residual, seed)
    encoding.check(frame, values.size)
    encoding.decode(frame, received)
    return frame, received, residual


def some_values(elements: int = 5000) -> Float32:
    """In (0, 1), and a one in each tile: int2 rounds positive values within its codes."""
    values = np.random.default_rng(3).random(elements).astype(np.float32)
    values[::64] = 1
    return values


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bytes_and_another_one_others(name: str) -> None:
    encoding, values = stochastic(name), some_values()
    frames = [sent(encoding, values, seed)[0].tobytes() for seed in (1, 1, 2, 1 + 2**32, -1)]
    assert frames[0] == frames[1]
    assert len(set(frames)) == 4


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_many_seeds_is_the_value(name: str) -> None:
    encoding, values, rounds = stochastic(name), some_values(), 400
    mean = np.zeros(values.size)
    for seed in range(rounds):
        mean += sent(encoding, values, seed)[1] / rounds
    largest_step = {"int8": 1 / 127, "int4": 1 / 7, "fp4": 1 / 3, "int2": 1 / 2}[name] * 1.01
    # A rounding deviates by half a step at most, so five deviations of the mean are this.
    assert np.abs(mean - values).max() <= 5 * largest_step / 2 / np.sqrt(rounds)
    assert abs((mean - values).mean()) <= 5 * largest_step / 2 / np.sqrt(rounds * values.size)


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_and_seeds_round_independently(name: str) -> None:
    """Rounded up or down is a coin that shows no correlation between elements, nor between seeds."""
    encoding = stochastic(name)
    values = np.full(2**16, 0.6 / (127 if name == "int8" else 7 if name == "int4" else 6), np.float32)
    values[::64] = 1
    coins = []
    for seed in (7, 8, 7 + 2**40):
        received = sent(encoding, values, seed)[1].reshape(-1, 64)[:, 1:]
        coins.append(received > received.mean())
    for one, other in ((coins[0][:, 1:], coins[0][:, :-1]), (coins[0], coins[1]), (coins[0], coins[2])):
        correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(one.size)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_and_no_error_reaches_a_step(name: str) -> None:
    encoding, values = stochastic(name), some_values()
    _, received, residual = sent(encoding, values, 5)
    np.testing.assert_allclose(received + residual, values, rtol=1e-6, atol=1e-7)
    step = {"int8": 1 / 127, "int4": 1 / 7, "fp4": 1 / 3, "int2": 1 / 2}[name] * 1.01
    assert np.abs(residual).max() < step


@pytest.mark.parametrize("name", NAMES)
def test_what_a_code_holds_exactly_is_never_rounded_away(name: str) -> None:
    codes = {
        "int8": np.arange(-127, 128),
        "int4": np.arange(-7, 8),
        "fp4": [0, 0.5, -1, 1.5, 2, -3, 4, 6],
        "int2": [-2, -1, 0, 1],
    }
    largest = {"int8": 127, "int4": 7, "fp4": 6, "int2": -2}[name]
    values = np.resize(np.array(codes[name], np.float32), 64 * 50)
    values[::64] = largest  # so that the scale is one
    for seed in range(20):
        np.testing.assert_array_equal(sent(stochastic(name), values, seed)[1], values)


@pytest.mark.parametrize("name", ["fp32", "bf16", "ternary", "sign", "topk"])
def test_a_member_without_it_says_which_have_it(name: str) -> None:
    with pytest.raises(EncodingError, match=r"fp4, int2, int4, int8"):
        stochastic(name)
