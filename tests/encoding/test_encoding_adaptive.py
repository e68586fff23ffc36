"""The guarantees of `adaptive`: conservation at every level, bits where they save most, bounded waiting, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.encoding import EncodingError, EncodingOptions, make_encoding, parse_encoding, warm_up
from paramserver.encoding.adaptive import Adaptive, BitPolicy, Part, Plan, WireLimit, kernels
from paramserver.encoding.adaptive.constants import INT4, INT8, LEVELS, SEGMENT, SIGN, SKIP, TERNARY, level_bytes
from paramserver.encoding.adaptive.planning import choose
from paramserver.encoding.base import Bytes, Float32

SIZES = [0, 1, 2, 7, 64, 65, 2047, 2048, 2049, 4100, 70_001]
TILES = [8, 64, 256, 2048]
MEMBERS = {SIGN: "sign", TERNARY: "ternary", INT4: "int4", INT8: "int8"}


def adaptive(tile: int = 64) -> Adaptive:
    return Adaptive(EncodingOptions(tile=tile))


def normal(elements: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(elements).astype(np.float32)


def uneven(elements: int, seed: int = 0) -> Float32:
    """Segments whose sizes differ a thousandfold."""
    segments = -(-elements // SEGMENT)
    sizes = 10.0 ** np.random.default_rng(seed).uniform(-3, 0, segments)
    return normal(elements, seed) * np.repeat(sizes, SEGMENT)[:elements].astype(np.float32)


def levels_of(elements: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, LEVELS, -(-elements // SEGMENT)).astype(np.uint8)


def encoded(encoding: Adaptive, values: Float32, residual: Float32, levels: np.ndarray | None = None) -> Bytes:  # type: ignore[type-arg]
    if levels is None:
        frame = np.full(encoding.frame_bytes(values.size), 0xFF, np.uint8)
        return frame[: encoding.encode(values, frame, residual)].copy()
    frame = np.full(encoding.bytes_at(levels, values.size), 0xFF, np.uint8)
    assert encoding.encode_levels(levels, values, frame, residual) == frame.size
    return frame


def decoded(encoding: Adaptive, frame: Bytes, elements: int) -> Float32:
    out = np.full(elements, np.nan, np.float32)
    encoding.decode(frame, out)
    return out


def energy(values: Float32) -> float:
    return float(np.square(values, dtype=np.float64).sum())


# ------------------------------------------------------------------------------ what is conserved


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("elements", SIZES)
def test_frame_and_residual_together_are_what_was_to_be_sent(elements: int, tile: int) -> None:
    encoding, values, residual = adaptive(tile), uneven(elements), uneven(elements, seed=1) / 100
    total = values + residual
    frame = encoded(encoding, values, residual, levels_of(elements))
    encoding.check(frame, elements)
    # sign may round where a value and its scale differ much; the other levels lose nothing.
    np.testing.assert_allclose(decoded(encoding, frame, elements) + residual, total, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tile", TILES)
def test_a_segment_is_a_frame_of_its_member(tile: int) -> None:
    elements = 3 * SEGMENT + 100
    for levels in itertools.islice(itertools.product(range(LEVELS), repeat=4), 0, None, 7):
        encoding, values, residual = adaptive(tile), normal(elements), np.zeros(elements, np.float32)
        frame = encoded(encoding, values, residual, np.array(levels, np.uint8))
        wanted = [bytes(levels)]
        for segment, level in enumerate(levels):
            part = values[segment * SEGMENT : (segment + 1) * SEGMENT]
            if level != SKIP:
                member = make_encoding(MEMBERS[level], EncodingOptions(tile=tile))
                own = np.empty(member.frame_bytes(part.size), np.uint8)
                member.encode(part, own, np.zeros_like(part))
                wanted.append(own.tobytes())
        assert frame.tobytes() == b"".join(wanted)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-(2.0**119), 2.0**119, width=32), max_size=150),
    st.sampled_from([1, 20, 40]),
    st.sampled_from(TILES),
)
def test_any_finite_values_give_a_frame_that_is_accepted(content: list[float], repeat: int, tile: int) -> None:
    encoding, values = adaptive(tile), np.array(content * repeat, np.float32)
    residual = np.zeros_like(values)
    frame = encoded(encoding, values, residual)
    encoding.check(frame, values.size)
    total = decoded(encoding, frame, values.size).astype(np.float64) + residual
    limit = 2**-22 * np.abs(values).max(initial=0)
    np.testing.assert_allclose(total, values, rtol=0, atol=limit)


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 1e-30, 1.0, 1e30, 3.4e38])
def test_extreme_magnitudes_are_encoded_and_conserved(magnitude: float) -> None:
    encoding, values = adaptive(), np.full(5000, magnitude, np.float32)
    values[::3] *= np.float32(-1)
    residual = np.zeros_like(values)
    frame = encoded(encoding, values, residual)
    encoding.check(frame, 5000)
    np.testing.assert_allclose(decoded(encoding, frame, 5000).astype(np.float64) + residual, values, rtol=1e-6)


def test_alone_it_leaves_at_most_the_error_that_it_allows() -> None:
    for seed in range(5):
        values, residual = uneven(100_000, seed), np.zeros(100_000, np.float32)
        frame = encoded(adaptive(), values, residual)
        assert 0.2 * energy(values) < energy(residual) <= 0.36 * energy(values)
        assert 8 * frame.size / values.size < 1


def test_decode_add_adds_what_decode_gives() -> None:
    encoding, base = adaptive(), normal(9000, seed=2)
    frame = encoded(encoding, normal(9000), np.zeros(9000, np.float32), levels_of(9000))
    added = base.copy()
    encoding.decode_add(frame, added)
    np.testing.assert_array_equal(added, base + decoded(encoding, frame, 9000))


def test_encode_is_deterministic_and_leaves_values_alone() -> None:
    values = uneven(30_000)
    before = values.copy()
    first = encoded(adaptive(), values, np.zeros_like(values))
    frame = np.empty(adaptive().frame_bytes(values.size), np.uint8)
    assert first.tobytes() == frame[: adaptive().encode(values, frame)].tobytes()
    np.testing.assert_array_equal(values, before)


# ------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("tile", [8, 64, 512])
@pytest.mark.parametrize("elements", [100, SEGMENT, 5000])
def test_losses_are_those_that_the_levels_leave(elements: int, tile: int) -> None:
    encoding, values, residual = adaptive(tile), uneven(elements), uneven(elements, seed=1) / 10
    losses = encoding.losses(values, residual)
    for level in range(LEVELS):
        left = residual.copy()
        encoded(encoding, values, left, np.full(len(losses), level, np.uint8))
        # int4 and int8 are estimated, and with few elements a tile from few errors.
        tolerance = {SKIP: 1e-6, SIGN: 0.02, TERNARY: 0.12}.get(level, 1.0)
        assert losses[:, level].sum() == pytest.approx(energy(left), rel=tolerance)


def exhaustive(losses: np.ndarray, counts: np.ndarray, tile: int, budget: float) -> int:  # type: ignore[type-arg]
    """The fewest bytes that bring the loss down to the budget, by trying everything."""
    best = 10**9
    for levels in itertools.product(range(LEVELS), repeat=len(losses)):
        if sum(losses[segment, level] for segment, level in enumerate(levels)) <= budget:
            best = min(best, sum(level_bytes(level, counts[i], tile) for i, level in enumerate(levels)))
    return best


@pytest.mark.parametrize("share", [0.05, 0.36, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_levels_are_within_one_step_of_the_best_choice(seed: int, share: float) -> None:
    elements = 4 * SEGMENT + 300
    losses = adaptive().losses(uneven(elements, seed), np.zeros(elements, np.float32))
    counts = np.array([SEGMENT] * 4 + [300])
    budget = share * float(losses[:, SKIP].sum())
    choice = choose(losses, counts, 64, np.zeros(5, np.uint8), budget)
    assert choice.left == pytest.approx(losses[np.arange(5), choice.levels].sum())
    assert choice.frame_bytes == sum(
        level_bytes(int(level), int(count), 64) for level, count in zip(choice.levels, counts, strict=True)
    )
    assert choice.left <= budget
    assert choice.frame_bytes <= exhaustive(losses, counts, 64, budget) + level_bytes(INT8, SEGMENT, 64)


def test_a_byte_limit_is_kept_and_spent_where_it_saves_most() -> None:
    elements = 50 * SEGMENT
    losses = adaptive().losses(uneven(elements), np.zeros(elements, np.float32))
    counts, none = np.full(50, SEGMENT), np.zeros(50, np.uint8)
    lefts = []
    for limit in (0, 100, 1000, 5000, 20_000):
        choice = choose(losses, counts, 64, none, 0.0, limit)
        assert choice.frame_bytes <= limit
        lefts.append(choice.left)
    assert lefts == sorted(lefts, reverse=True)
    assert lefts[0] == pytest.approx(losses[:, SKIP].sum())
    loudest = int(losses[:, SKIP].argmax())
    assert choose(losses, counts, 64, none, 0.0, 600).levels[loudest] > SKIP


# ------------------------------------------------------------------------------------- policy


def one_round(
    policy: BitPolicy, parts: dict[int, Part], byte_limit: int | None = None
) -> tuple[Plan, dict[int, Bytes]]:
    plan = policy.plan(parts, byte_limit)
    frames: dict[int, Bytes] = {}
    for block, part in parts.items():
        if block in plan.levels:
            frames[block] = np.empty(plan.frame_bytes(block, part.values.size), np.uint8)
            assert plan.encode(block, part, frames[block]) == frames[block].size
        else:
            plan.hold(part)
    return plan, frames


def parts_of(elements: dict[int, int], residuals: dict[int, Float32], seed: int) -> dict[int, Part]:
    return {block: Part(uneven(size, seed + block), residuals[block]) for block, size in elements.items()}


def test_the_error_that_is_left_follows_the_budget_over_all_blocks() -> None:
    elements = {0: 40_000, 1: 40_000, 5: 100}
    policy = BitPolicy(elements, 64, error=0.5)
    residuals = {block: np.zeros(size, np.float32) for block, size in elements.items()}
    totals = []
    for seed in range(30):
        parts = {block: Part(normal(size, seed + block), residuals[block]) for block, size in elements.items()}
        plan, _ = one_round(policy, parts)
        totals.append(plan.total)
        left = sum(energy(residual) for residual in residuals.values())
        assert left == pytest.approx(plan.left, rel=0.05)
        assert left <= 0.25 * max(totals) * 1.05
        assert left >= 0.1 * min(totals)


def test_nothing_is_lost_over_many_rounds_whatever_is_skipped() -> None:
    elements = {0: 9000, 1: 300, 2: 5000}
    policy, encoding = BitPolicy(elements, 64, longest_wait=5), adaptive()
    residuals = {block: np.zeros(size, np.float32) for block, size in elements.items()}
    sent = {block: np.zeros(size) for block, size in elements.items()}
    wanted = {block: np.zeros(size) for block, size in elements.items()}
    for seed in range(60):
        parts = parts_of(elements, residuals, seed)
        for block, part in parts.items():
            wanted[block] += part.values
        for block, frame in one_round(policy, parts)[1].items():
            sent[block] += decoded(encoding, frame, elements[block])
    for block in elements:
        np.testing.assert_allclose(sent[block] + residuals[block], wanted[block], atol=1e-4)


@pytest.mark.parametrize("longest_wait", [0, 1, 7])
def test_no_segment_waits_longer_than_the_bound(longest_wait: int) -> None:
    elements = {0: 30 * SEGMENT}
    policy = BitPolicy(elements, 64, longest_wait=longest_wait)
    residuals = {0: np.zeros(30 * SEGMENT, np.float32)}
    waited, longest = np.zeros(30, int), 0
    for seed in range(50):
        # Segment 3 alone is loud, so that nothing else would ever be chosen.
        values = normal(30 * SEGMENT, seed) * np.float32(1e-6)
        values[3 * SEGMENT : 4 * SEGMENT] *= np.float32(1e6)
        plan, _ = one_round(policy, {0: Part(values, residuals[0])}, byte_limit=0)
        levels = plan.levels.get(0, np.zeros(30, np.uint8))
        waited = np.where(levels == SKIP, waited + 1, 0)
        longest = max(longest, int(waited.max()))
    assert longest == longest_wait


def test_segments_that_must_go_out_do_not_all_go_at_once() -> None:
    policy = BitPolicy({0: 160 * SEGMENT}, 64, error_limit=0.999, longest_wait=15)
    values, residual = normal(160 * SEGMENT) * np.float32(1e-6), np.zeros(160 * SEGMENT, np.float32)
    for _ in range(40):
        plan = policy.plan({0: Part(values, residual)}, byte_limit=0)
        assert np.count_nonzero(plan.levels[0]) == 10


def test_a_block_without_anything_to_send_is_not_sent() -> None:
    policy = BitPolicy({0: 5000, 1: 5000}, 64, longest_wait=0)
    zeros = np.zeros(5000, np.float32)
    plan, frames = one_round(policy, {0: Part(zeros, zeros.copy()), 1: Part(normal(5000), zeros.copy())})
    assert set(frames) == {1}
    assert set(plan.levels) == {1}


def test_a_quiet_step_sends_little_and_keeps_it_all() -> None:
    policy, residual = BitPolicy({0: 20_000}, 64, longest_wait=100), np.zeros(20_000, np.float32)
    one_round(policy, {0: Part(normal(20_000), residual)})
    residual[:] = 0
    values = normal(20_000, seed=1) / 100
    plan, frames = one_round(policy, {0: Part(values, residual)})
    assert not frames
    assert plan.left == pytest.approx(energy(values))
    np.testing.assert_array_equal(residual, values)


def test_a_byte_limit_holds_for_all_frames_together() -> None:
    elements = {0: 40_000, 1: 40_000}
    policy = BitPolicy(elements, 64, longest_wait=1000)
    residuals = {block: np.zeros(size, np.float32) for block, size in elements.items()}
    plan, frames = one_round(policy, parts_of(elements, residuals, 0), byte_limit=1500)
    assert 0 < sum(frame.size for frame in frames.values()) <= 1500 < plan.wanted_bytes


@pytest.mark.parametrize(("byte_limit", "share"), [(None, 0.36), (0, 0.64), (10**9, 0.36)])
def test_short_of_bytes_more_is_left_but_no_more_than_the_limit(byte_limit: int | None, share: float) -> None:
    policy = BitPolicy({0: 200 * SEGMENT}, 64, error=0.6, error_limit=0.8, longest_wait=1000)
    residual, usual = np.zeros(200 * SEGMENT, np.float32), 0.0
    for seed in range(12):
        plan, _ = one_round(policy, {0: Part(uneven(200 * SEGMENT, seed), residual)}, byte_limit)
        usual = plan.total if not seed else 0.9 * usual + 0.1 * plan.total
        assert 0.9 * share * usual < plan.left <= share * usual
        assert energy(residual) == pytest.approx(plan.left, rel=0.05)


def test_the_first_updates_of_a_model_are_sent_finely() -> None:
    def left(updates: int) -> float:
        policy = BitPolicy({0: 200 * SEGMENT}, 64, error=0.6, longest_wait=1000, settling_updates=100)
        zeros = np.zeros(200 * SEGMENT, np.float32)
        plan = policy.plan({0: Part(uneven(200 * SEGMENT, 1), zeros)}, None, updates)
        return plan.left / plan.total

    assert left(0) < 0.001
    assert 0.9 * 0.09 < left(49) <= 0.09
    assert 0.9 * 0.36 < left(99) <= 0.36
    assert left(10_000) == left(99)


def test_the_same_rounds_give_the_same_plans() -> None:
    def rounds() -> list[bytes]:
        policy, residuals = BitPolicy({0: 30_000}, 64), {0: np.zeros(30_000, np.float32)}
        return [
            b"".join(frame.tobytes() for frame in one_round(policy, parts_of({0: 30_000}, residuals, seed))[1].values())
            for seed in range(5)
        ]

    assert rounds() == rounds()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_planned_and_their_frame_is_refused(bad: float) -> None:
    values, residual = normal(5000), np.zeros(5000, np.float32)
    values[3000] = bad
    policy = BitPolicy({0: 5000, 1: 5000}, 64)
    plan, frames = one_round(policy, {0: Part(values, residual), 1: Part(normal(5000), residual.copy())})
    assert plan.levels[0][1] == INT8
    with pytest.raises(EncodingError) as refused:
        adaptive().check(frames[0], 5000)
    assert refused.value.code == "not-finite"
    adaptive().check(frames[1], 5000)
    # The moving average has not become NaN with it.
    assert np.isfinite(policy.plan({1: Part(normal(5000), np.zeros(5000, np.float32))}).left)


@pytest.mark.parametrize("options", [{"error": 0.0}, {"error": 1.0}, {"error_limit": 0.5}, {"longest_wait": -1}])
def test_a_policy_that_could_not_work_is_rejected(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        BitPolicy({0: 100}, 64, **options)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- wire


def test_a_step_gets_what_the_wire_carries_while_it_computes() -> None:
    wire = WireLimit()
    assert wire.bytes(compute_seconds=0.1) is None, "no exchange was seen"
    wire.observe(push_bytes=10_000, pull_bytes=500, exchange_seconds=0.5)
    assert wire.bytes(0.1) == 2000
    wire.observe(push_bytes=1000, pull_bytes=500, exchange_seconds=0.5)
    assert wire.bytes(0.1) == 2000, "an exchange may be slow for other reasons"


def test_what_comes_in_may_go_out_too() -> None:
    wire = WireLimit()
    for _ in range(20):
        wire.observe(push_bytes=100, pull_bytes=5000, exchange_seconds=0.5)
    assert wire.bytes(0.0) == 5000
    assert wire.bytes(0.1) == 5000
    assert wire.bytes(1.0) == 10_000, "the larger way tells the rate"


def test_updates_that_arrive_late_are_made_smaller() -> None:
    wire = WireLimit()
    wire.observe(push_bytes=10_000, pull_bytes=500, exchange_seconds=0.1)
    assert wire.bytes(0.1, lag_versions=8, usual_lag_versions=8) == 10_000
    assert wire.bytes(0.1, lag_versions=16, usual_lag_versions=8) == 5000


# ------------------------------------------------------------------------------------ bad frames


def refusal(frame: Bytes, elements: int, tile: int = 64) -> str | None:
    try:
        adaptive(tile).check(frame, elements)
    except EncodingError as error:
        return error.code
    return None


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=500), st.integers(0, 300), st.sampled_from(TILES), st.data())
def test_random_bytes_are_refused_or_decode_to_finite_values(
    content: bytes, elements: int, tile: int, data: st.DataObject
) -> None:
    frame, encoding = np.frombuffer(content, np.uint8).copy(), adaptive(tile)
    if elements and data.draw(st.booleans()):
        level = np.array([data.draw(st.integers(0, LEVELS - 1))], np.uint8)
        frame = np.resize(frame, encoding.bytes_at(level, elements)) if frame.size else level
        frame[0] = level[0]
    if refusal(frame, elements, tile) is None:
        assert np.isfinite(decoded(encoding, frame, elements)).all()


def test_frames_that_no_encoder_writes_are_refused_by_name() -> None:
    elements = 2 * SEGMENT + 5
    levels = np.array([TERNARY, SKIP, INT4], np.uint8)
    good = encoded(adaptive(), normal(elements), np.zeros(elements, np.float32), levels)
    assert refusal(good, elements) is None
    assert refusal(good[:-1], elements) == "wrong-size"
    assert refusal(np.append(good, good[:1]), elements) == "wrong-size"
    assert refusal(good[:2], elements) == "wrong-size"
    assert refusal(good, elements + SEGMENT) in ("wrong-size", "corrupt-frame")

    def changed(at: int, byte: int) -> Bytes:
        frame = good.copy()
        frame[at] = byte
        return frame

    assert refusal(changed(1, LEVELS), elements) == "corrupt-frame"
    assert refusal(changed(1, SIGN), elements) == "wrong-size"
    assert refusal(changed(3 + 1, 0x7F), elements) == "not-finite"
    assert refusal(changed(3 + 2 * 32 + 7, 243), elements) == "corrupt-frame"


def test_everything_is_compiled_once_whatever_comes() -> None:
    encoding = adaptive()
    warm_up(encoding)
    policy, residual = BitPolicy({0: 5000}, 64), np.zeros(5000, np.float32)
    _, frames = one_round(policy, {0: Part(np.frombuffer(normal(5000).tobytes(), np.float32), residual)})
    frame = np.frombuffer(b"." + frames[0].tobytes(), np.uint8)[1:]
    encoding.check(frame, 5000)
    encoding.decode_add(frame, residual)
    for kernel in (
        kernels.measure,
        kernels.improve,
        kernels.encode,
        kernels.decode,
        kernels.faults,
    ):
        assert len(kernel.signatures) == 1, kernel
        assert kernel.targetoptions["nogil"]
        assert not kernel.targetoptions["fastmath"]


def test_tiles_above_a_segment_are_unknown() -> None:
    assert parse_encoding("adaptive/2048").identifier == "adaptive/2048"
    with pytest.raises(EncodingError, match="8 to 2048"):
        parse_encoding("adaptive/4096")


def test_levels_that_do_not_fit_the_block_are_an_error() -> None:
    values, residual = normal(5000), np.zeros(5000, np.float32)
    with pytest.raises(ValueError, match="levels"):
        adaptive().encode_levels(np.zeros(2, np.uint8), values, np.empty(2, np.uint8), residual)
    with pytest.raises(ValueError, match="levels"):
        adaptive().encode_levels(np.full(3, LEVELS, np.uint8), values, np.empty(3, np.uint8), residual)
