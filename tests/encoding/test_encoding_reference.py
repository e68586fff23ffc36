"""The bytes of every deterministic member are those that docs/encodings.md says: a slow reference makes the same."""

from __future__ import annotations

import encoding_reference as reference
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paramserver.encoding import EncodingOptions, make_encoding
from paramserver.encoding.base import Float32

SIZES = [0, 1, 7, 63, 64, 65, 130, 2047, 2048, 2049, 5000]
KINDS = ["normal", "zeros", "denormal", "huge", "spike", "wide", "any bits"]
NAMES = [*reference.TILED, "topk"]


def values_of(kind: str, elements: int, seed: int) -> Float32:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(elements).astype(np.float32)
    match kind:
        case "zeros":
            values[generator.random(elements) < 0.9] = 0
            values[values < 0] *= np.float32(0)  # minus zeros
        case "denormal":
            values *= np.float32(1e-40)
        case "huge":
            values *= np.float32(1e30)
        case "spike":
            values[elements // 2 : elements // 2 + 1] = np.float32(3e38)
        case "wide":
            values *= np.exp2(generator.uniform(-140, 120, elements)).astype(np.float32)
        case "any bits":
            values = generator.integers(0, 2**32, elements, dtype=np.uint32).view(np.float32)
            values[~np.isfinite(values)] = np.float32(3e38)
    return values


@settings(max_examples=250, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    tile=st.sampled_from([8, 16, 64, 128, 2048, 65536]),
    elements=st.sampled_from(SIZES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
    density=st.sampled_from([1e-4, 0.01, 0.3, 1.0]),
)
@example(name="sign", tile=64, elements=2048, kind="wide", seed=1, density=0.01)
@example(name="ternary", tile=64, elements=4096, kind="any bits", seed=1, density=0.01)
def test_bytes_values_and_residual_are_those_of_the_reference(
    name: str, tile: int, elements: int, kind: str, seed: int, density: float
) -> None:
    encoding = make_encoding(name, EncodingOptions(tile=tile, density=density))
    values = values_of(kind, elements, seed)
    residual = values_of("normal", elements, seed + 1) * np.float32(0.1)
    expected = reference.encode(name, tile, values, residual, density)
    frame = np.full(encoding.frame_bytes(elements), 0xFF, np.uint8)
    assert encoding.encode(values, frame, residual) == frame.size
    np.testing.assert_array_equal(frame, expected.frame)
    encoding.check(frame, elements)
    received = np.full(elements, np.nan, np.float32)
    encoding.decode(frame, received)
    np.testing.assert_array_equal(received, expected.decoded)
    np.testing.assert_array_equal(residual, expected.residual)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tile", [8, 64, 2048])
def test_bytes_stay_those_of_the_reference_while_the_residual_is_carried_on(name: str, tile: int) -> None:
    encoding, elements = make_encoding(name, EncodingOptions(tile=tile)), 4500
    residual, expected_residual = np.zeros(elements, np.float32), np.zeros(elements, np.float32)
    for seed in range(4):
        values = values_of("normal", elements, seed)
        frame = np.zeros(encoding.frame_bytes(elements), np.uint8)
        encoding.encode(values, frame, residual)
        expected = reference.encode(name, tile, values, expected_residual)
        expected_residual = expected.residual
        np.testing.assert_array_equal(frame, expected.frame)
        np.testing.assert_array_equal(residual, expected_residual)


@pytest.mark.parametrize("name", ["int4", "fp4", "int2", "ternary", "sign"])
def test_places_beyond_the_last_element_hold_the_code_of_zero(name: str) -> None:
    encoding = make_encoding(name)
    last = encoding.frame_bytes(9)
    frame = np.full(last, 0xFF, np.uint8)
    encoding.encode(np.full(9, -7, np.float32), frame)
    # The last byte's last place, which is the tenth element's or a later one's.
    worth = {"int4": 16, "fp4": 16, "int2": 64, "ternary": 81, "sign": 128}[name]
    zero = {"int4": 8, "fp4": 0, "int2": 2, "ternary": 1, "sign": 0}[name]
    assert frame[-1] // worth == zero


def test_topk_takes_the_first_of_equals() -> None:
    encoding = make_encoding("topk", EncodingOptions(density=0.5))
    values = np.array([1, -2, 2, -1, 1, 2, -1, 1], np.float32)
    frame, received = np.zeros(encoding.frame_bytes(8), np.uint8), np.zeros(8, np.float32)
    encoding.encode(values, frame)
    encoding.decode(frame, received)
    np.testing.assert_allclose(received, [1, -2, 2, 0, 0, 2, 0, 0], rtol=0.01)


def test_topk_is_exact_where_a_sample_of_the_block_misleads() -> None:
    """Large values only where no sample looks, or only where it looks, change the time and not the choice."""
    elements = 70_001
    stride = elements // 4096 | 1
    for sampled in (True, False):
        values = values_of("normal", elements, 5)
        values[(np.arange(elements) % stride == 0) == sampled] *= np.float32(1e-3)
        encoding = make_encoding("topk")
        frame, residual = np.zeros(encoding.frame_bytes(elements), np.uint8), np.zeros(elements, np.float32)
        encoding.encode(values, frame, residual)
        expected = reference.encode("topk", 64, values, np.zeros(elements, np.float32))
        np.testing.assert_array_equal(frame, expected.frame)
