"""The guarantees of `coded`: exact conservation, few bits, tables that every machine has, refusal of corrupt frames."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.encoding import EncodingError, make_encoding, parse_encoding
from paramserver.encoding.base import Bytes, Float32
from paramserver.encoding.coded import Coded, StepPolicy, kernels, round_step, warm_up
from paramserver.encoding.coded.constants import ALL_ZERO, CLASSES, RAW, SEGMENT
from paramserver.encoding.coded.tables import tables

SIZES = [0, 1, 2, 3, 7, 64, 65, 2047, 2048, 2049, 4100, 70_001]

coded = make_encoding("coded")
assert isinstance(coded, Coded)


def normal(elements: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(elements).astype(np.float32)


def encoded(values: Float32, residual: Float32 | None = None, step: float | None = None) -> Bytes:
    frame = np.full(coded.frame_bytes(values.size), 0xFF, np.uint8)
    if step is None:
        return frame[: coded.encode(values, frame, residual)].copy()
    return frame[: coded.encode_with_step(values, frame, residual, step)[0]].copy()


def decoded(frame: Bytes, elements: int) -> Float32:
    out = np.full(elements, np.nan, np.float32)
    coded.decode(frame, out)
    return out


def shannon_bits(codes: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
    share = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-(share * np.log2(share)).sum())


# ------------------------------------------------------------------------------ what is conserved


@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("step", [None, 0.125, 2.0])
def test_frame_and_residual_together_are_exactly_what_was_to_be_sent(elements: int, step: float | None) -> None:
    values, residual = normal(elements), normal(elements, seed=1) / 100
    total = values + residual
    frame = encoded(values, residual, step)
    coded.check(frame, elements)
    assert frame.size <= coded.frame_bytes(elements)
    np.testing.assert_array_equal(decoded(frame, elements) + residual, total)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=150),
    st.integers(0, 2**32),
    st.sampled_from([1, 20, 40]),
    st.one_of(st.none(), st.floats(2.0**-126, 2.0**120)),
)
def test_any_values_at_any_step_are_conserved(content: list[float], seed: int, repeat: int, step: float | None) -> None:
    values = np.array(content * repeat, np.float32)
    np.random.default_rng(seed).shuffle(values)
    residual = np.zeros_like(values)
    frame = encoded(values, residual, None if step is None else round_step(step))
    coded.check(frame, values.size)
    received = decoded(frame, values.size)
    assert np.isfinite(received).all()
    # Float32 subtraction rounds where a value lies beyond the largest code.
    np.testing.assert_allclose(received.astype(np.float64) + residual, values, rtol=2**-23)
    assert (np.abs(residual) <= np.abs(values)).all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1.0, 1e30, 3.4e38])
def test_extreme_magnitudes_are_conserved(magnitude: float) -> None:
    values = normal(5000) * 0 + np.float32(magnitude)
    values[::3] *= np.float32(-1)
    residual = np.zeros_like(values)
    received = decoded(encoded(values, residual), values.size)
    np.testing.assert_array_equal(received + residual, values)


def test_repeated_encoding_delivers_the_whole_sum() -> None:
    elements, rounds = 3000, 50
    residual, sent, wanted = np.zeros(elements, np.float32), np.zeros(elements), np.zeros(elements)
    for seed in range(rounds):
        sent += decoded(encoded(normal(elements, seed), residual), elements)
        wanted += normal(elements, seed)
    np.testing.assert_allclose(sent + residual, wanted, atol=1e-4)
    assert np.abs(residual).max() < 3


@pytest.mark.parametrize("scale", [0.3, 1.0, 30.0, 300.0])
def test_codes_are_values_over_step_rounded_half_to_even_and_limited(scale: float) -> None:
    values = normal(6000) * np.float32(scale)
    codes = np.clip(np.rint(values.astype(np.float64)), -127, 127)
    np.testing.assert_array_equal(decoded(encoded(values, step=1.0), values.size), codes)


def test_a_step_of_zero_sends_nothing_and_keeps_all() -> None:
    values, residual = normal(3000), np.zeros(3000, np.float32)
    frame = encoded(values, residual, step=0.0)
    assert not decoded(frame, 3000).any()
    np.testing.assert_array_equal(residual, values)


def test_encode_is_deterministic_and_leaves_values_alone() -> None:
    values = normal(9000)
    before = values.copy()
    assert encoded(values).tobytes() == encoded(values, np.zeros_like(values)).tobytes()
    np.testing.assert_array_equal(values, before)


def test_decode_add_adds_what_decode_gives() -> None:
    frame, base = encoded(normal(5000)), normal(5000, seed=2)
    added = base.copy()
    coded.decode_add(frame, added)
    np.testing.assert_array_equal(added, base + decoded(frame, 5000))


def test_frame_without_a_residual_keeps_within_half_a_step() -> None:
    values = normal(5000)
    received = decoded(encoded(values, step=0.25), 5000)
    assert np.abs(received - values).max() <= 0.125


# -------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("shape", ["normal", "laplace"])
def test_bits_are_within_five_percent_of_the_codes_entropy(shape: str, step: float) -> None:
    elements = 200_000
    generator = np.random.default_rng(3)
    drawn = generator.standard_normal(elements) if shape == "normal" else generator.laplace(size=elements) / 2**0.5
    values = drawn.astype(np.float32)
    bits = 8 * encoded(values, step=step).size / elements
    entropy = shannon_bits(np.rint(values / np.float32(step)).astype(np.int64))
    assert entropy <= bits <= 1.05 * entropy + 0.01


def test_segments_that_stand_still_cost_a_byte() -> None:
    values = np.zeros(100 * SEGMENT, np.float32)
    values[:SEGMENT] = normal(SEGMENT)
    assert encoded(values, step=1.0).size < 100 + SEGMENT // 2


def test_no_frame_is_longer_than_it_may_be_whatever_the_codes() -> None:
    generator = np.random.default_rng(5)
    for elements in (1, 5, 2048, 2051, 10_000):
        for values in (
            generator.uniform(-127, 127, elements),
            generator.choice([0.0, 5.0, 100.0], elements, p=[0.9, 0.05, 0.05]),
            generator.choice([4.0, -4.0], elements),
            np.where(np.arange(elements) % 64 == 0, 127.0, 3.0),
        ):
            frame = encoded(values.astype(np.float32), step=1.0)
            assert frame.size <= coded.frame_bytes(elements)
            np.testing.assert_array_equal(decoded(frame, elements), np.rint(values))


def test_every_table_shares_out_all_slots_and_never_changes() -> None:
    made = tables()
    counts = made.marks >> 12
    assert (counts[1:].sum(axis=1) == 4096).all()
    assert (counts[1:RAW, 81] >= 1).all()
    assert made.slots.shape == (CLASSES, 4096)
    # Part of the wire format: another value here is another encoding, which needs another name.
    assert hashlib.sha256(counts.astype("<u4").tobytes()).hexdigest()[:16] == "0ffa50f61ab148df"


# ------------------------------------------------------------------------------------- publishing


def test_every_replica_that_adds_the_frames_is_bit_identical_to_the_published_one() -> None:
    policy, generator = StepPolicy(), np.random.default_rng(7)
    blocks = {0: 5000, 1: 300}
    weights = {block: normal(size, block) for block, size in blocks.items()}
    published = {block: values.copy() for block, values in weights.items()}
    replicas = {block: values.copy() for block, values in weights.items()}
    for _ in range(30):
        for block, size in blocks.items():
            weights[block] += (generator.standard_normal(size) * 0.01).astype(np.float32)
            frame = np.empty(coded.frame_bytes(size), np.uint8)
            taken = policy.publish(block, weights[block], published[block], frame)
            coded.decode_add(frame[:taken], replicas[block])
            np.testing.assert_array_equal(replicas[block], published[block])
    for block in blocks:
        # 30 steps of 0.01 would be 0.055 off.
        assert np.abs(weights[block] - published[block]).std() < 0.015


def test_the_step_is_a_multiple_of_what_all_blocks_move() -> None:
    policy = StepPolicy(relative=2.0)
    for _ in range(20):
        for block, scale in ((0, 0.1), (1, 0.3)):
            delta = np.full(1000, scale, np.float32)
            policy.publish(block, delta, np.zeros(1000, np.float32), np.empty(coded.frame_bytes(1000), np.uint8))
    assert policy.step() == round_step(2 * math.sqrt((0.1**2 + 0.3**2) / 2))
    policy.forget(1)
    assert policy.step() == round_step(0.2)


def test_a_policy_goes_on_from_its_state() -> None:
    def one_round(policy: StepPolicy, seed: int) -> bytes:
        frame = np.empty(coded.frame_bytes(3000), np.uint8)
        return frame[: policy.publish(0, normal(3000, seed), np.zeros(3000, np.float32), frame)].tobytes()

    first = StepPolicy()
    one_round(first, 1)
    second = StepPolicy(state=first.state())
    assert one_round(first, 2) == one_round(second, 2)


def test_a_block_that_moves_again_after_all_stood_still_is_published_at_once() -> None:
    policy, frame = StepPolicy(), np.empty(coded.frame_bytes(1000), np.uint8)
    published = np.zeros(1000, np.float32)
    for _ in range(200):
        policy.publish(0, published.copy(), published, frame)
    assert policy.step() == 0.0
    weights = normal(1000)
    policy.publish(0, weights, published, frame)
    assert np.square(weights - published).sum() < np.square(weights).sum() / 2


def test_a_step_that_no_frame_can_hold_is_an_error() -> None:
    with pytest.raises(ValueError, match="round_step"):
        encoded(normal(10), step=0.3)
    with pytest.raises(ValueError, match="relative"):
        StepPolicy(relative=math.nan)


@given(st.floats(2.0**-140, 2.0**140))
def test_steps_are_the_nearest_bfloat16_in_range(step: float) -> None:
    found = round_step(step)
    bits = int(np.array([found], np.float32).view(np.uint32)[0])
    assert bits % 2**16 == 0
    assert found == 2.0**-126 or found == 2.0**120 or abs(found - step) <= step / 256


# ------------------------------------------------------------------------------------ bad frames


def refusal(frame: Bytes, elements: int) -> str | None:
    try:
        coded.check(frame, elements)
    except EncodingError as error:
        return error.code
    return None


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 300), st.integers(0, RAW), st.booleans())
def test_random_bytes_are_refused_or_decode_to_finite_values(
    content: bytes, elements: int, index: int, has_header: bool
) -> None:
    frame = np.frombuffer(content, np.uint8).copy()
    if has_header and frame.size > 3:
        frame[:3] = 0, 0x3F, index
        frame[4:19:4] &= 0x7F
    out = np.full(elements, 5, np.float32)
    if refusal(frame, elements) is None:
        coded.decode(frame, out)
        assert np.isfinite(out).all()
    else:
        with pytest.raises(EncodingError):
            coded.decode_add(frame, out)
        assert (out == 5).all()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_frame_with_a_changed_byte_is_refused_or_decodes_to_finite_values(data: st.DataObject) -> None:
    elements = data.draw(st.sampled_from([1, 100, 2048, 5000]))
    frame = encoded(normal(elements) * np.float32(data.draw(st.sampled_from([0.5, 1.0, 40.0]))), step=1.0)
    frame[data.draw(st.integers(0, frame.size - 1))] ^= data.draw(st.integers(1, 255))
    if refusal(frame, elements) is None:
        assert np.isfinite(decoded(frame, elements)).all()


@pytest.mark.parametrize("elements", [40, 5000])
def test_nearly_every_changed_byte_of_the_code_stream_is_noticed(elements: int) -> None:
    frame = encoded(normal(elements), step=2.0)
    unnoticed, places = 0, range(2 + -(-elements // SEGMENT), frame.size)
    for at in places:
        changed = frame.copy()
        changed[at] ^= 0x55
        unnoticed += refusal(changed, elements) is None
    # Symbols of equal probability can change into each other without a trace: this is no checksum.
    assert unnoticed <= len(places) / 20


@pytest.mark.parametrize("cut", [1, 2, 3, 16, 100])
def test_a_frame_that_ends_early_or_late_is_refused(cut: int) -> None:
    frame = encoded(normal(5000))
    assert refusal(frame[:-cut], 5000) == "corrupt-frame"
    assert refusal(np.concatenate([frame, np.zeros(cut, np.uint8)]), 5000) == "corrupt-frame"
    assert refusal(frame[:4], 5000) == "wrong-size"
    assert refusal(np.zeros(coded.frame_bytes(5000) + 1, np.uint8), 5000) == "wrong-size"
    assert refusal(frame, 5000 + SEGMENT) in ("wrong-size", "corrupt-frame")


@pytest.mark.parametrize("bits", [0x0000, 0x0001, 0x007F, 0x7B81, 0x7F80, 0x7FC0, 0x8000, 0xBF80, 0xFFFF])
def test_a_step_that_no_encoder_writes_is_refused(bits: int) -> None:
    frame = encoded(normal(100))
    frame[:2] = bits & 0xFF, bits >> 8
    assert refusal(frame, 100) == "not-finite"


def test_a_class_that_does_not_exist_is_refused() -> None:
    frame = encoded(normal(100))
    frame[2] = CLASSES
    assert refusal(frame, 100) == "corrupt-frame"
    assert frame[2] != ALL_ZERO


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_make_a_frame_that_is_refused(bad: float) -> None:
    values = normal(3000)
    values[1234] = bad
    assert refusal(encoded(values), 3000) == "not-finite"
    assert refusal(encoded(values, step=1.0), 3000) == "not-finite"
    policy, published = StepPolicy(), np.zeros(3000, np.float32)
    frame = np.empty(coded.frame_bytes(3000), np.uint8)
    assert refusal(frame[: policy.publish(0, values, published, frame)], 3000) == "not-finite"


def test_publishing_is_compiled_once_whatever_comes() -> None:
    warm_up()
    named = [kernels.quantise, kernels.quantise_delta, kernels.sum_of_squares, kernels.code, kernels.decode]
    buffer = bytearray(coded.frame_bytes(5000) + 1)
    frame, published = np.frombuffer(buffer, np.uint8)[1:], np.zeros(5000, np.float32)
    weights = np.frombuffer(normal(5000).tobytes(), np.float32)
    taken = StepPolicy().publish(0, weights, published, frame)
    encoded(weights)
    coded.decode(frame[:taken], published)
    coded.decode_add(np.frombuffer(bytes(buffer), np.uint8)[1 : 1 + taken], published)
    for kernel in named:
        assert len(kernel.signatures) == 1, kernel
        assert kernel.targetoptions["nogil"]
        assert not kernel.targetoptions["fastmath"]


def test_identifier_has_no_tile() -> None:
    assert parse_encoding("coded").identifier == "coded"
    with pytest.raises(EncodingError, match="should be written"):
        parse_encoding("coded/64")
