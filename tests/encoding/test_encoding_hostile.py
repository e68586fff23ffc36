"""What a peer sends: refused by name, or decoded to finite values inside the block; never a byte beyond."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.encoding import Encoding, EncodingError, EncodingOptions, make_encoding, parse_encoding
from paramserver.encoding.base import Bytes, Float32

IDENTIFIERS = [
    *("fp32", "bf16", "int8/8", "int8/64", "int4/64", "int4/2048", "fp4/64", "int2/64"),
    *("ternary/64", "sign/8", "sign/65536", "topk/8", "topk/64"),
]
GUARD = 16


def refusal_of(encoding: Encoding, frame: Bytes, elements: int) -> str:
    """The refusal's name, "" where the frame is accepted."""
    try:
        encoding.check(frame, elements)
    except EncodingError as error:
        return error.code
    return ""


def good_frame(encoding: Encoding, elements: int, seed: int = 0) -> Bytes:
    frame = np.zeros(encoding.frame_bytes(elements), np.uint8)
    encoding.encode(np.random.default_rng(seed).standard_normal(elements).astype(np.float32), frame)
    return frame


def decoded_inside(encoding: Encoding, frame: Bytes, elements: int) -> Float32:
    """Decode and decode_add into the middle of an array, whose ends must stay what they were."""
    for decode in (encoding.decode_add, encoding.decode):
        array = np.zeros(elements + 2 * GUARD, np.float32)
        array[:GUARD] = array[elements + GUARD :] = 7
        decode(frame, array[GUARD : elements + GUARD])
        assert (array[:GUARD] == 7).all()
        assert (array[elements + GUARD :] == 7).all()
    return array[GUARD : elements + GUARD]


@settings(max_examples=600, deadline=None)
@given(st.data(), st.sampled_from(IDENTIFIERS), st.sampled_from([0, 1, 2, 9, 63, 64, 65, 150, 2048, 2050, 4100]))
def test_random_bytes_are_refused_or_decode_to_finite_values(
    data: st.DataObject, identifier: str, elements: int
) -> None:
    encoding = parse_encoding(identifier)
    size = data.draw(st.one_of(st.just(encoding.frame_bytes(elements)), st.integers(0, 500)))
    pattern = data.draw(st.binary(min_size=1, max_size=64))
    frame = np.resize(np.frombuffer(pattern, np.uint8), size)
    code = refusal_of(encoding, frame, elements)
    assert code in ("", "wrong-size", "not-finite", "corrupt-frame")
    if not code:
        assert np.isfinite(decoded_inside(encoding, frame, elements)).all()


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(IDENTIFIERS),
    st.sampled_from([1, 9, 64, 150, 2048, 2050, 4100]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
    st.sampled_from([0.01, 0.2, 1.0]),
)
def test_good_frames_with_wrong_bytes_are_refused_or_decode_to_finite_values(
    identifier: str, elements: int, changes: list[tuple[int, int]], density: float
) -> None:
    name, _, tile = identifier.partition("/")
    encoding = make_encoding(name, EncodingOptions(tile=int(tile or 64), density=density))
    frame = good_frame(encoding, elements)
    for place, byte in changes:
        frame[place % frame.size] = byte
    decoder = parse_encoding(identifier)  # a decoder does not know the density
    code = refusal_of(decoder, frame, elements)
    if not code:
        assert np.isfinite(decoded_inside(decoder, frame, elements)).all()
    elif code != "wrong-size":
        decoded_inside(decoder, frame, elements)  # whatever it gives, it stays inside


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80, 0x7B81, 0x7F7F, 0x0001, 0x007F, 0x8000, 0xBF80])
@pytest.mark.parametrize("identifier", [one for one in IDENTIFIERS if "/" in one])
def test_scales_that_no_encoder_writes_are_refused(identifier: str, bits: int) -> None:
    encoding = parse_encoding(identifier)
    frame = good_frame(encoding, 200)
    position = 2 + 2 + 1 if encoding.name == "topk" else 0
    frame[position : position + 2] = np.array([bits], "<u2").view(np.uint8)
    is_good = encoding.name == "int2" and bits == 0xBF80
    assert refusal_of(encoding, frame, 200) == ("" if is_good else "not-finite")


@pytest.mark.parametrize("bits", [0x0000, 0x0080, 0x3F80, 0x7B80])
@pytest.mark.parametrize("identifier", [one for one in IDENTIFIERS if "/" in one])
def test_scales_at_their_limits_are_accepted_and_decode_to_finite_values(identifier: str, bits: int) -> None:
    encoding = parse_encoding(identifier)
    frame = good_frame(encoding, 200)
    position = 2 + 2 + 1 if encoding.name == "topk" else 0
    frame[position : position + 2] = np.array([bits], "<u2").view(np.uint8)
    assert refusal_of(encoding, frame, 200) == ""
    assert np.isfinite(decoded_inside(encoding, frame, 200)).all()


def test_ternary_bytes_beyond_five_digits_are_refused() -> None:
    encoding = parse_encoding("ternary/64")
    frame = good_frame(encoding, 4100)
    for place in (2 * 65, frame.size - 1):
        for byte in (242, 243, 255):
            changed = frame.copy()
            changed[place] = byte
            assert refusal_of(encoding, changed, 4100) == ("" if byte == 242 else "corrupt-frame")


def topk_frame(counts: list[int], offsets: list[int], elements: int, beyond: int = 0) -> Bytes:
    kept = len(offsets)
    half = -(-kept // 2)
    high = [offset >> 8 for offset in offsets] + [beyond] * (2 * half - kept)
    nibbles = [low | up << 4 for low, up in zip(high[:half], high[half:], strict=True)]
    head = np.array(counts, "<u2").view(np.uint8)
    scales = np.full(-(-kept // 64), 0x3F80, "<u2").view(np.uint8)
    lows = [offset & 255 for offset in offsets]
    return np.concatenate([head, np.array([*lows, *nibbles], np.uint8), scales, np.ones(kept, np.uint8)])


@pytest.mark.parametrize(
    ("counts", "offsets", "beyond", "code"),
    [
        ([2, 1], [0, 2047, 1], 0, ""),
        ([0, 1], [1], 0, ""),
        ([2, 1], [5, 5, 1], 0, "corrupt-frame"),  # twice the same
        ([2, 1], [6, 5, 1], 0, "corrupt-frame"),  # descending
        ([2, 1], [0, 2048, 1], 0, "corrupt-frame"),  # beyond a run
        ([2, 1], [0, 4095, 1], 0, "corrupt-frame"),
        ([2, 1], [0, 1, 2], 0, "corrupt-frame"),  # beyond the last run, which is shorter
        ([2, 1], [0, 1, 1], 1, "corrupt-frame"),  # the place beyond an odd number
        ([0, 0], [], 0, "corrupt-frame"),  # an encoder keeps one at least
        ([3, 1], [0, 1, 1], 0, "wrong-size"),
        ([65535, 65535], [0, 1, 1], 0, "wrong-size"),
    ],
)
def test_topk_streams_that_are_not_well_formed_are_refused(
    counts: list[int], offsets: list[int], beyond: int, code: str
) -> None:
    encoding, elements = parse_encoding("topk/64"), 2050
    frame = topk_frame(counts, offsets, elements, beyond)
    assert refusal_of(encoding, frame, elements) == code
    if code != "wrong-size":
        decoded_inside(encoding, frame, elements)


def test_topk_of_another_density_is_decoded_all_the_same() -> None:
    sender, receiver = make_encoding("topk", EncodingOptions(density=0.25)), parse_encoding("topk/64")
    frame = good_frame(sender, 5000)
    assert refusal_of(receiver, frame, 5000) == ""
    assert np.count_nonzero(decoded_inside(receiver, frame, 5000)) == 1250
