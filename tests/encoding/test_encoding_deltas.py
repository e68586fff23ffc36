"""Publishing in one pass: the same bytes, and the same published values to the bit, as one step after the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.encoding import Encoding, EncodingError, EncodingOptions, encoding_names, make_encoding
from paramserver.encoding.base import Bytes, Float32
from paramserver.encoding.tiled import kernels as tiled

FUSED = ["fp32", "bf16", "int8", "int4", "fp4", "int2", "ternary", "sign"]
TILES = [8, 32, 64, 128, 2048, 4096, 65536]
SIZES = [0, 1, 7, 8, 63, 64, 65, 129, 2047, 2048, 2049, 4096, 70_001]
MAGNITUDES = [0.0, 1e-45, 1e-40, 1.2e-38, 1e-20, 1.0, 1e30, 3e37]

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def normal(elements: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(elements).astype(np.float32)


def published_by(encoding: Encoding, weights: Float32, published: Float32, stepwise: bool) -> tuple[Bytes, Float32]:
    """Frame and published values, by the member or by the three steps that the interface says."""
    # Filled with ones, so that a byte that is not written shows.
    frame, values = np.full(encoding.frame_bytes(weights.size), 0xFF, np.uint8), published.copy()
    publish = Encoding.encode_delta if stepwise else type(encoding).encode_delta
    with np.errstate(over="ignore", invalid="ignore"):
        written = publish(encoding, weights, values, frame, np.empty_like(weights))
    return frame[:written], values


def assert_published_alike(encoding: Encoding, weights: Float32, published: Float32) -> None:
    (frame, values), (expected_frame, expected) = (
        published_by(encoding, weights, published, stepwise) for stepwise in (False, True)
    )
    np.testing.assert_array_equal(frame, expected_frame)
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))
    replica = published.copy()
    with np.errstate(over="ignore"):
        encoding.decode_add(frame, replica)
    np.testing.assert_array_equal(values.view(np.uint32), replica.view(np.uint32))


@pytest.mark.parametrize("name", FUSED)
def test_members_of_fixed_codes_publish_in_one_pass(name: str) -> None:
    assert type(make_encoding(name)).encode_delta is not Encoding.encode_delta


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", FUSED)
def test_one_pass_publishes_what_three_would_at_every_size(name: str, tile: int) -> None:
    encoding = make_encoding(name, EncodingOptions(tile=tile))
    for elements in SIZES:
        assert_published_alike(encoding, normal(elements), normal(elements, seed=1))


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", FUSED)
def test_one_pass_publishes_what_three_would_at_every_magnitude(name: str, magnitude: float) -> None:
    for tile in (8, 64):
        encoding = make_encoding(name, EncodingOptions(tile=tile))
        weights, published = normal(5000) * np.float32(magnitude), normal(5000, seed=1) * np.float32(magnitude)
        assert_published_alike(encoding, weights, published)
        assert_published_alike(encoding, weights, weights * np.float32(1 + 2**-20))
        weights[::2], published[::3] = -0.0, -0.0
        assert_published_alike(encoding, weights, published)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(FUSED),
    st.sampled_from([8, 64, 128]),
    st.lists(st.tuples(finite, finite), max_size=150),
    st.sampled_from([1, 1, 30]),
)
def test_one_pass_publishes_what_three_would_over_all_of_float32(
    name: str, tile: int, pairs: list[tuple[float, float]], repetitions: int
) -> None:
    weights, published = (np.array([pair[i] for pair in pairs] * repetitions, np.float32) for i in (0, 1))
    with np.errstate(over="ignore"):
        is_finite = bool(np.isfinite(weights - published).all())
    encoding = make_encoding(name, EncodingOptions(tile=tile))
    if is_finite:
        assert_published_alike(encoding, weights, published)
    else:
        frame, _ = published_by(encoding, weights, published, stepwise=False)
        assert refusal_of(encoding, frame, weights.size) == "not-finite"


def refusal_of(encoding: Encoding, frame: Bytes, elements: int) -> str:
    """The refusal's name, "" where the frame is accepted."""
    try:
        encoding.check(frame, elements)
    except EncodingError as error:
        return error.code
    return ""


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 64, 2999])
@pytest.mark.parametrize("name", FUSED)
def test_weights_that_are_not_finite_make_a_frame_that_is_refused(name: str, bad: float, place: int) -> None:
    encoding, weights, published = make_encoding(name), normal(3000), normal(3000, seed=1)
    weights[place] = bad
    frame, values = published_by(encoding, weights, published, stepwise=False)
    expected_frame, expected = published_by(encoding, weights, published, stepwise=True)
    assert refusal_of(encoding, frame, 3000) == "not-finite"
    np.testing.assert_array_equal(frame, expected_frame)
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("name", sorted(set(encoding_names()) - {"adaptive", "coded"}))
def test_what_a_delta_loses_stays_in_the_difference_and_comes_later(name: str) -> None:
    encoding, weights = make_encoding(name), normal(3000)
    published, scratch = np.zeros(3000, np.float32), np.empty(3000, np.float32)
    before, rounds = weights.copy(), {"topk": 1000, "sign": 400}.get(name, 60)
    for _ in range(rounds):
        frame = np.empty(encoding.frame_bytes(3000), np.uint8)
        encoding.encode_delta(weights, published, frame, scratch)
    np.testing.assert_array_equal(weights, before)
    np.testing.assert_allclose(published, weights, atol=0.02)


@pytest.mark.parametrize("name", ["int8", "int4", "fp4", "int2"])
def test_a_stochastic_encoder_publishes_by_the_three_steps(name: str) -> None:
    encoding = make_encoding(name, EncodingOptions(rounding="stochastic"))
    weights, published = normal(5000), normal(5000, seed=1)
    assert_published_alike(encoding, weights, published)
    plain, _ = published_by(make_encoding(name), weights, published, stepwise=False)
    assert not np.array_equal(published_by(encoding, weights, published, stepwise=False)[0], plain)


@pytest.mark.parametrize("name", FUSED)
def test_unaligned_frames_and_read_only_weights_are_published_like_others(name: str) -> None:
    encoding, weights = make_encoding(name), normal(5000)
    weights.flags.writeable = False
    expected, _ = published_by(encoding, weights, np.zeros(5000, np.float32), stepwise=True)
    frame = np.full(expected.size + 2, 7, np.uint8)
    encoding.encode_delta(weights, np.zeros(5000, np.float32), frame[1:-1], np.empty(5000, np.float32))
    np.testing.assert_array_equal(frame[1:-1], expected)
    assert frame[0] == frame[-1] == 7


@pytest.mark.parametrize("name", FUSED)
def test_nothing_beyond_the_block_is_touched(name: str) -> None:
    encoding, weights = make_encoding(name), normal(2100)
    held = np.full(2200, 7, np.float32)
    encoding.encode_delta(
        weights, held[50:2150], np.empty(encoding.frame_bytes(2100), np.uint8), np.empty(2100, np.float32)
    )
    assert (held[:50] == 7).all()
    assert (held[2150:] == 7).all()


@pytest.mark.parametrize("name", FUSED)
def test_wrong_arrays_of_the_caller_never_reach_compiled_code(name: str) -> None:
    encoding, weights, published = make_encoding(name), normal(100), np.zeros(100, np.float32)
    frame, scratch = np.zeros(encoding.frame_bytes(100), np.uint8), np.empty(100, np.float32)
    with pytest.raises(TypeError, match="values is float64"):
        encoding.encode_delta(weights.astype(np.float64), published, frame, scratch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="published has 99"):
        encoding.encode_delta(weights, published[:-1], frame, scratch)
    with pytest.raises(ValueError, match="published is read-only"):
        encoding.encode_delta(weights, np.frombuffer(bytes(400), np.float32), frame, scratch)
    with pytest.raises(ValueError, match="frame"):
        encoding.encode_delta(weights, published, frame[:-1], scratch)
    assert not published.any()


def test_every_tiled_encoder_has_a_kernel_of_deltas() -> None:
    names = [name.removeprefix("encode_") for name in dir(tiled) if name.startswith("encode_")]
    deterministic = {name for name in names if name in encoding_names()}
    assert deterministic == {name.removeprefix("delta_") for name in dir(tiled) if name.startswith("delta_")}
