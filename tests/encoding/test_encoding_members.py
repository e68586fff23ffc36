"""The guarantees of every encoding: sizes, exact conservation of what was to be sent, refusal of bad frames."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.encoding import Encoding, EncodingError, EncodingOptions, encoding_names, make_encoding, parse_encoding
from paramserver.encoding.base import Bytes, Float32

IDENTIFIERS = ["fp32", "bf16", "int8/8", "int8/64", "int8/2048", "int8/65536"]
SIZES = [1, 2, 7, 63, 64, 65, 127, 128, 4095, 4096, 4097, 70_001]
LARGEST = np.finfo(np.float32).max

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


def is_accepted(encoding: Encoding, frame: Bytes, elements: int) -> bool:
    try:
        encoding.check(frame, elements)
    except EncodingError:
        return False
    return True


def normal(elements: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(elements).astype(np.float32)


def test_family_holds_the_three_members() -> None:
    assert encoding_names() == ["bf16", "fp32", "int8"]
    assert make_encoding("int8").identifier == "int8/64"


@pytest.mark.parametrize("elements", SIZES)
def test_frame_size_is_scales_and_codes(elements: int) -> None:
    assert make_encoding("fp32").frame_bytes(elements) == 4 * elements
    assert make_encoding("bf16").frame_bytes(elements) == 2 * elements
    assert make_encoding("int8").frame_bytes(elements) == elements + 4 * ((elements + 63) // 64)


@pytest.mark.parametrize("elements", SIZES)
def test_frame_and_residual_together_are_exactly_what_was_to_be_sent(encoding: Encoding, elements: int) -> None:
    values, residual = normal(elements), normal(elements, seed=1) / 100
    total = values + residual
    frame = encoded(encoding, values, residual)
    np.testing.assert_array_equal(decoded(encoding, frame, elements) + residual, total)
    encoding.check(frame, elements)


@settings(max_examples=200, deadline=None)
@given(st.lists(finite, min_size=1, max_size=150), st.sampled_from(IDENTIFIERS))
def test_conservation_is_exact_over_all_of_float32(content: list[float], identifier: str) -> None:
    encoding, values = parse_encoding(identifier), np.array(content, np.float32)
    residual = np.zeros_like(values)
    frame = encoded(encoding, values, residual)
    encoding.check(frame, values.size)
    np.testing.assert_array_equal(decoded(encoding, frame, values.size) + residual, values)


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1.0, 1e30, 3.4e38, LARGEST])
@pytest.mark.parametrize("elements", [1, 65])
def test_extreme_magnitudes_are_conserved(encoding: Encoding, magnitude: float, elements: int) -> None:
    values = np.full(elements, magnitude, np.float32)
    values[::2] *= np.float32(-1)
    residual = np.zeros_like(values)
    frame = encoded(encoding, values, residual)
    encoding.check(frame, elements)
    received = decoded(encoding, frame, elements)
    np.testing.assert_array_equal(received + residual, values)
    assert (np.abs(residual) <= np.abs(values)).all()
    if magnitude >= 1e-30:
        np.testing.assert_allclose(received, values, rtol=0.01)


def test_repeated_encoding_delivers_the_whole_sum(encoding: Encoding) -> None:
    elements, rounds = 200, 50
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


@pytest.mark.parametrize("tile", [8, 64, 2048])
def test_int8_follows_its_written_definition(tile: int) -> None:
    values = normal(5000) * np.float32(37)
    frame = encoded(make_encoding("int8", EncodingOptions(tile=tile)), values)
    tiles = -(-values.size // tile)
    padded = np.zeros(tiles * tile, np.float32)
    padded[: values.size] = values
    padded = padded.reshape(tiles, tile)
    bits = (np.abs(padded).max(axis=1) / np.float32(127)).view(np.uint32)
    scales = ((bits + np.uint32(0xFFF)) & ~np.uint32(0xFFF)).view(np.float32)
    codes = np.rint(padded * (np.float32(1) / scales)[:, None]).astype(np.int8)
    np.testing.assert_array_equal(frame[: 4 * tiles].view(np.float32), scales)
    np.testing.assert_array_equal(frame[4 * tiles :].view(np.int8), codes.reshape(-1)[: values.size])


@settings(max_examples=200, deadline=None)
@given(st.lists(finite, min_size=1, max_size=150))
def test_int8_scales_have_12_mantissa_bits_and_codes_stay_within_127(content: list[float]) -> None:
    values = np.array(content, np.float32)
    tiles = -(-values.size // 64)
    frame = encoded(make_encoding("int8"), values)
    assert not (frame[: 4 * tiles].view(np.uint32) & 0xFFF).any()
    assert frame[4 * tiles :].view(np.int8).min() >= -127


def test_int8_error_is_at_most_half_a_scale() -> None:
    values, residual = normal(64 * 100), np.zeros(6400, np.float32)
    frame = encoded(make_encoding("int8"), values, residual)
    scales = frame[:400].view(np.float32)
    assert (np.abs(residual).reshape(100, 64) <= scales[:, None] * np.float32(0.50001)).all()


def test_int8_tile_of_zeros_has_scale_and_codes_zero() -> None:
    values = np.concatenate([np.zeros(64, np.float32), normal(64)])
    frame = encoded(make_encoding("int8"), values)
    assert not frame[:4].any()
    assert frame[4:8].any()
    assert not frame[8:72].any()


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


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 3e38, -3e36])
def test_int8_scale_whose_product_could_overflow_is_refused(scale: float) -> None:
    encoding = make_encoding("int8")
    frame = encoded(encoding, normal(200))
    frame[12:16] = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
    with pytest.raises(EncodingError) as refusal:
        encoding.check(frame, 200)
    assert refusal.value.code == "not-finite"


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=0, max_size=400), st.integers(1, 150), st.sampled_from(IDENTIFIERS))
def test_random_bytes_are_refused_or_decode_to_finite_values(content: bytes, elements: int, identifier: str) -> None:
    encoding = parse_encoding(identifier)
    size = encoding.frame_bytes(elements)
    frame = np.frombuffer((content * (size // max(1, len(content)) + 1))[:size] if content else b"", np.uint8)
    if is_accepted(encoding, frame, elements):
        assert np.isfinite(decoded(encoding, frame, elements)).all()


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
