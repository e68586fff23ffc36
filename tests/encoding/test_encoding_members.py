"""The guarantees of every encoding: sizes, exact conservation of what was to be sent, refusal of bad frames."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.encoding import Encoding, EncodingError, EncodingOptions, encoding_names, make_encoding, parse_encoding
from paramserver.encoding.base import Bytes, Float32

IDENTIFIERS = [
    *("fp32", "bf16", "int8/8", "int8/64", "int8/65536", "int4/64", "int4/2048", "fp4/64", "int2/8", "int2/64"),
    *("ternary/8", "ternary/64", "ternary/2048", "sign/64", "sign/65536", "topk/8", "topk/64"),
]
TILED = [identifier for identifier in IDENTIFIERS if "/" in identifier and not identifier.startswith("topk")]
SIZES = [0, 1, 2, 7, 63, 64, 65, 127, 128, 2047, 2048, 2049, 4097, 70_001]
LARGEST = np.finfo(np.float32).max
CODES = {
    "int8": range(-127, 128),
    "int4": range(-7, 8),
    "fp4": [sign * magnitude for sign in (-1, 1) for magnitude in (0, 0.5, 1, 1.5, 2, 3, 4, 6)],
    "int2": range(-2, 2),
    "ternary": range(-1, 2),
    "sign": (-1, 1),
}

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.fixture(params=IDENTIFIERS)
def encoding(request: pytest.FixtureRequest) -> Encoding:
    return parse_encoding(request.param)


def encoded(encoding: Encoding, values: Float32, residual: Float32 | None = None) -> Bytes:
    # Filled with ones, so that a byte that is not written shows.
    frame = np.full(encoding.frame_bytes(values.size), 0xFF, np.uint8)
    encoding.encode(values, frame, residual)
    return frame


def decoded(encoding: Encoding, frame: Bytes, elements: int) -> Float32:
    out = np.full(elements, np.nan, np.float32)
    encoding.decode(frame, out)
    return out


def normal(elements: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(elements).astype(np.float32)


def assert_nothing_is_lost(encoding: Encoding, received: Float32, residual: Float32, total: Float32) -> None:
    """Exactly nothing; with sign, whose scale may be far from a value, within the rounding of the residual."""
    if encoding.name == "sign":
        lost = received.astype(np.float64) + residual - total
        assert (np.abs(lost) <= np.abs(residual.astype(np.float64)) * 2.0**-24).all()
    else:
        np.testing.assert_array_equal(received.astype(np.float64) + residual, total)


def test_family_holds_the_members_of_the_page() -> None:
    fixed = {"bf16", "fp32", "fp4", "int2", "int4", "int8", "sign", "ternary", "topk"}
    assert set(encoding_names()) == fixed | {"adaptive", "coded"}
    assert make_encoding("int8").identifier == "int8/64"


@pytest.mark.parametrize("elements", SIZES)
def test_frame_size_is_scales_and_codes(elements: int) -> None:
    scales, (runs, rest) = 2 * math.ceil(elements / 64), divmod(elements, 2048)
    assert make_encoding("fp32").frame_bytes(elements) == 4 * elements
    assert make_encoding("bf16").frame_bytes(elements) == 2 * elements
    for name, places in {"int8": 1, "int4": 2, "fp4": 2, "int2": 4, "ternary": 5, "sign": 8}.items():
        codes = runs * math.ceil(2048 / places) + math.ceil(rest / places)
        assert make_encoding(name).frame_bytes(elements) == scales + codes
    kept = min(elements, max(1, math.ceil(elements / 100)))
    topk = 2 * math.ceil(elements / 2048) + 2 * kept + math.ceil(kept / 2) + 2 * math.ceil(kept / 64)
    assert make_encoding("topk").frame_bytes(elements) == topk


@pytest.mark.parametrize("elements", SIZES)
def test_frame_and_residual_together_are_exactly_what_was_to_be_sent(encoding: Encoding, elements: int) -> None:
    values, residual = normal(elements), normal(elements, seed=1) / 100
    total = values + residual
    frame = encoded(encoding, values, residual)
    encoding.check(frame, elements)
    assert_nothing_is_lost(encoding, decoded(encoding, frame, elements), residual, total)


@settings(max_examples=200, deadline=None)
@given(st.lists(finite, min_size=1, max_size=150), st.sampled_from(IDENTIFIERS))
def test_nothing_is_lost_over_all_of_float32(content: list[float], identifier: str) -> None:
    encoding, values = parse_encoding(identifier), np.array(content, np.float32)
    residual = np.zeros_like(values)
    frame = encoded(encoding, values, residual)
    encoding.check(frame, values.size)
    assert_nothing_is_lost(encoding, decoded(encoding, frame, values.size), residual, values)


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1.0, 1e30, 3.4e38, LARGEST])
@pytest.mark.parametrize("elements", [1, 65])
def test_extreme_magnitudes_are_conserved(encoding: Encoding, magnitude: float, elements: int) -> None:
    values = np.full(elements, magnitude, np.float32)
    values[::2] *= np.float32(-1)
    residual = np.zeros_like(values)
    frame = encoded(encoding, values, residual)
    encoding.check(frame, elements)
    received = decoded(encoding, frame, elements)
    assert_nothing_is_lost(encoding, received, residual, values)
    # A scale is at least 2**-126, which sign puts in the place of less, and at most 2**120.
    assert (np.abs(residual) <= np.maximum(np.abs(values), np.float32(2.0**-126))).all()
    if encoding.name in ("fp32", "bf16", "int8") and 1e-30 <= magnitude <= 1e38:
        np.testing.assert_allclose(received, values, rtol=0.01)


def test_repeated_encoding_delivers_the_whole_sum(encoding: Encoding) -> None:
    elements, rounds = 200, 50
    if encoding.name == "topk":
        rounds = 500  # what is sent in a round is 1%
    residual, sent, wanted = np.zeros(elements, np.float32), np.zeros(elements), np.zeros(elements)
    for seed in range(rounds):
        values = normal(elements, seed)
        sent += decoded(encoding, encoded(encoding, values, residual), elements)
        wanted += values
    np.testing.assert_allclose(sent + residual, wanted, atol=1e-4)


def test_encoding_without_residual_makes_the_same_bytes_as_with_zeros(encoding: Encoding) -> None:
    values = normal(70_001)
    np.testing.assert_array_equal(encoded(encoding, values), encoded(encoding, values, np.zeros_like(values)))


def test_encode_leaves_values_alone_and_is_deterministic(encoding: Encoding) -> None:
    values = normal(1000)
    before = values.copy()
    first = encoded(encoding, values, np.zeros_like(values))
    second = encoded(encoding, values, np.zeros_like(values))
    np.testing.assert_array_equal(values, before)
    np.testing.assert_array_equal(first, second)


def test_fp32_is_lossless_and_spends_the_residual() -> None:
    values, residual = normal(100), normal(100, seed=1)
    total = values + residual
    frame = encoded(make_encoding("fp32"), values, residual)
    assert frame.tobytes() == total.astype("<f4").tobytes()
    assert not residual.any()


def test_bf16_rounds_to_nearest_half_to_even() -> None:
    bits = np.array([0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0xBF818000, 0x7F7FFFFF], np.uint32)
    codes = encoded(make_encoding("bf16"), bits.view(np.float32)).view(np.uint16)
    # The last one would round to infinity and becomes the largest finite value.
    assert [hex(code) for code in codes] == ["0x3f80", "0x3f80", "0x3f80", "0x3f81", "0x3f82", "0xbf82", "0x7f7f"]


def test_bf16_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")
    values = np.concatenate([normal(5000), normal(5000) * np.float32(1e-39), normal(5000) * np.float32(1e30)])
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    encoding = make_encoding("bf16")
    np.testing.assert_array_equal(decoded(encoding, encoded(encoding, values), values.size), expected)


@pytest.mark.parametrize("identifier", TILED)
def test_every_value_gets_the_nearest_code(identifier: str) -> None:
    """Which bounds the error of every member: no code of its tile's scale would have been nearer."""
    encoding, elements = parse_encoding(identifier), 5000
    values = normal(elements) * np.exp(normal(elements, seed=1))
    residual = np.zeros_like(values)
    frame = encoded(encoding, values, residual)
    tiles = -(-elements // encoding.tile)
    scales = (frame[: 2 * tiles].view("<u2").astype(np.uint32) << 16).view(np.float32)
    candidates = np.repeat(scales, encoding.tile)[:elements, None] * np.array(CODES[encoding.name], np.float32)
    nearest = np.abs(values[:, None].astype(np.float64) - candidates).min(axis=1)
    assert (np.abs(residual) <= nearest * (1 + 1e-6) + 1e-5 * np.abs(values)).all()


@pytest.mark.parametrize("identifier", TILED)
def test_a_tile_of_zeros_decodes_to_zeros_beside_others(identifier: str) -> None:
    encoding = parse_encoding(identifier)
    values = np.concatenate([np.zeros(encoding.tile, np.float32), -np.zeros(encoding.tile, np.float32), normal(64)])
    frame = encoded(encoding, values)
    encoding.check(frame, values.size)
    assert not frame[:4].any()
    assert not decoded(encoding, frame, values.size)[: 2 * encoding.tile].any()
    assert decoded(encoding, frame, values.size)[2 * encoding.tile :].any()


@pytest.mark.parametrize("identifier", IDENTIFIERS)
def test_decode_add_adds_what_decode_gives(identifier: str) -> None:
    encoding, held = parse_encoding(identifier), normal(70_001, seed=2)
    frame = encoded(encoding, normal(70_001))
    expected = held + decoded(encoding, frame, held.size)
    encoding.decode_add(frame, held)
    np.testing.assert_array_equal(held, expected)


def test_unaligned_read_only_frames_decode_like_others(encoding: Encoding) -> None:
    values = normal(1000)
    frame = encoded(encoding, values)
    for offset in range(4):
        received = np.frombuffer(b"x" * offset + frame.tobytes(), np.uint8)[offset:]
        assert not received.flags.writeable
        encoding.check(received, values.size)
        np.testing.assert_array_equal(decoded(encoding, received, 1000), decoded(encoding, frame, 1000))


def test_unaligned_frames_are_written_like_others(encoding: Encoding) -> None:
    values = normal(1000)
    frame = np.zeros(encoding.frame_bytes(1000) + 3, np.uint8)
    encoding.encode(values, frame[3:], np.zeros_like(values))
    np.testing.assert_array_equal(frame[3:], encoded(encoding, values))
    assert not frame[:3].any()


@pytest.mark.parametrize("change", [-1, 1])
def test_frame_of_another_size_is_refused_by_name(encoding: Encoding, change: int) -> None:
    frame = np.zeros(encoding.frame_bytes(100) + change, np.uint8)
    with pytest.raises(EncodingError, match="bytes") as refusal:
        encoding.check(frame, 100)
    assert refusal.value.code == "wrong-size"
    with pytest.raises(EncodingError):
        encoding.decode(frame, np.empty(100, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 64, 999])
def test_values_that_are_not_finite_give_a_frame_that_is_refused(encoding: Encoding, bad: float, place: int) -> None:
    values = normal(1000)
    values[place] = bad
    frame = encoded(encoding, values, np.zeros_like(values))
    with pytest.raises(EncodingError) as refusal:
        encoding.check(frame, 1000)
    assert refusal.value.code == "not-finite"


def test_wrong_arrays_of_the_caller_never_reach_compiled_code(encoding: Encoding) -> None:
    values, residual = normal(100), np.zeros(100, np.float32)
    frame = np.zeros(encoding.frame_bytes(100), np.uint8)
    with pytest.raises(TypeError, match="values is float64"):
        encoding.encode(values.astype(np.float64), frame)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="contiguous"):
        encoding.encode(normal(200)[::2], frame)
    with pytest.raises(ValueError, match="frame"):
        encoding.encode(values, frame[:-1])
    with pytest.raises(ValueError, match="residual has 99"):
        encoding.encode(values, frame, residual[:-1])
    with pytest.raises(ValueError, match="read-only"):
        encoding.decode(frame, np.frombuffer(bytes(400), np.float32))


def test_unknown_names_and_tiles_say_what_is_allowed() -> None:
    with pytest.raises(EncodingError, match="did you mean 'int8'"):
        make_encoding("int9")
    with pytest.raises(EncodingError, match="power of two"):
        make_encoding("int8", EncodingOptions(tile=48))
    with pytest.raises(EncodingError, match="written 'fp32'"):
        parse_encoding("fp32/64")
