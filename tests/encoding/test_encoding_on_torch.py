"""Encoders on torch against the compiled ones, byte for byte; and what keeps torch out of every other room."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paramserver
from paramserver.encoding import Encoding, EncodingError, EncodingOptions, make_encoding
from paramserver.encoding.base import Bytes, Float32

torch = pytest.importorskip("torch")

from paramserver.encoding import on_torch  # noqa: E402 - it needs torch
from paramserver.encoding.on_torch import topk  # noqa: E402

PLAIN = ["fp32", "bf16"]
TILED = ["int8", "int4", "fp4", "int2", "ternary", "sign"]
MEMBERS = [*PLAIN, *TILED, "topk"]
SIZES = [0, 1, 7, 64, 65, 2048, 2049, 6149]
TILES = [8, 64, 2048]
ROUNDS = 3


def values_of(kind: str, elements: int, generator: np.random.Generator) -> Float32:
    """Values of a kind; even ROUNDS times their sum stays finite."""
    normal = generator.standard_normal(elements)
    with np.errstate(under="ignore"):
        match kind:
            case "usual":
                values = normal * 0.01
            case "sparse":
                values = np.where(generator.random(elements) < 0.05, normal, 0.0)
            case "denormal":
                values = normal * 1e-40
            case "every magnitude":
                values = normal * 10.0 ** generator.integers(-45, 31, elements)
            case "near the end of float32":
                values = np.sign(normal) * 5e37
            case "largest of float32":
                values = np.sign(normal) * np.finfo(np.float32).max
            case "equals":
                values = generator.integers(-3, 4, elements).astype(np.float64)
            case "half-way":
                values = generator.integers(-24, 25, elements) / 4
            case "spike":
                values = np.where(np.arange(elements) % 1000 == 500, 1e30, normal * 1e-3)
            case _:  # "zeros": of both signs
                values = np.where(normal < 0, -0.0, 0.0)
        return values.astype(np.float32)


KINDS = [
    "usual",
    "sparse",
    "denormal",
    "every magnitude",
    "near the end of float32",
    "equals",
    "half-way",
    "spike",
    "zeros",
]
ONCE = "largest of float32"  # a second round would overflow


def normal(elements: int, seed: int = 0) -> Float32:
    return values_of("usual", elements, np.random.default_rng(seed))


def member(name: str, tile: int = 64, density: float = 0.01) -> Encoding:
    return make_encoding(name, EncodingOptions(tile=tile, density=density))


def encoded(encoding: Encoding, values: Float32, residual: Float32 | None = None) -> Bytes:
    """By the compiled member."""
    frame = np.full(encoding.frame_bytes(values.size), 0xFF, np.uint8)
    return frame[: encoding.encode(values, frame, residual)]


def assert_same_bits(found: object, expected: Float32, what: str) -> None:
    """Zeros of different signs are different bits."""
    np.testing.assert_array_equal(found.numpy().view(np.uint32), expected.view(np.uint32), what)  # type: ignore[attr-defined]


def assert_agreement(encoding: Encoding, rounds: list[Float32]) -> None:
    """Frames, residuals, decoded values and sums are those of the compiled member, round after round."""
    elements = rounds[0].size
    residual, received = np.zeros(elements, np.float32), normal(elements, seed=7)
    residual_torch, received_torch = torch.zeros(elements), torch.from_numpy(received.copy())
    for values in rounds:
        frame = encoded(encoding, values, residual)
        frame_torch = on_torch.encode(encoding, torch.from_numpy(values), residual_torch)
        assert frame_torch.dtype == torch.uint8
        assert frame_torch.numpy().tobytes() == frame.tobytes()
        assert_same_bits(residual_torch, residual, "residual")
        encoding.check(frame, elements)
        decoded = np.empty(elements, np.float32)
        encoding.decode(frame, decoded)
        assert_same_bits(on_torch.decode(encoding, frame_torch, elements), decoded, "decoded")
        encoding.decode_add(frame, received)
        on_torch.decode_add_(encoding, frame_torch, received_torch)
        assert_same_bits(received_torch, received, "sum")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MEMBERS)
def test_frames_and_residuals_are_those_of_the_compiled_member(name: str, kind: str) -> None:
    generator = np.random.default_rng(KINDS.index(kind))
    for elements in SIZES:
        for tile in TILES if name not in PLAIN else [64]:
            rounds = [values_of(kind, elements, generator) for _ in range(ROUNDS)]
            assert_agreement(member(name, tile, density=0.03), rounds)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(MEMBERS),
    st.sampled_from([8, 16, 64, 128, 2048, 4096]),
    st.integers(0, 5000),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=ROUNDS),
    st.sampled_from([1e-9, 0.01, 0.3, 1.0]),
    st.integers(0, 2**32),
)
def test_agreement_holds_for_any_size_tile_and_mixture(
    name: str, tile: int, elements: int, kinds: list[str], density: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    assert_agreement(member(name, tile, density), [values_of(kind, elements, generator) for kind in kinds])


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(MEMBERS),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=150),
)
def test_agreement_holds_over_all_of_float32(name: str, content: list[float]) -> None:
    values = np.array(content, np.float32)
    assert_agreement(member(name, 8, density=0.3), [values, values[::-1].copy()])


@pytest.mark.parametrize("elements", [70_001, 262_144])
@pytest.mark.parametrize("name", MEMBERS)
def test_agreement_holds_for_whole_blocks_and_the_largest_tile(name: str, elements: int) -> None:
    for tile in (64, 65_536) if name not in PLAIN else (64,):
        assert_agreement(member(name, tile), [normal(elements, seed) for seed in range(2)])


@pytest.mark.parametrize("tile", [8, 64, 2048])
@pytest.mark.parametrize("name", MEMBERS)
def test_agreement_holds_where_scales_and_means_reach_their_limit(name: str, tile: int) -> None:
    for elements in (1, 70, 5000):
        assert_agreement(member(name, tile), [values_of(ONCE, elements, np.random.default_rng(0))])


def test_means_are_summed_in_the_written_order() -> None:
    """Means on the very border between two scales, where an addend that is lost or not lost decides."""
    encoding = member("sign", 2048)
    border = 257 * 2.0**16  # half-way between two bfloat16, and so large that adding 1 is lost
    for large, scale in ((64, 2.0**19), (32, 2.0**18 * (1 + 2.0**-7))):
        # Of 64 each lane loses all its ones; of 32 the other lanes add theirs up first.
        values = np.ones(2048, np.float32)
        values[:large] = border
        frame = on_torch.encode(encoding, torch.from_numpy(values))
        assert frame[:2].clone().view(torch.bfloat16).item() == scale
        assert_agreement(encoding, [values])
    generator = np.random.default_rng(5)
    tiles = generator.integers(1, 4, (500, 64)) * (generator.random((500, 64)) < 0.05)
    tiles[np.arange(500), generator.integers(0, 64, 500)] = 2 * border
    values = tiles.astype(np.float32).ravel()
    assert_agreement(member("sign"), [values])
    scales = encoded(member("sign"), values)[:1000].view("<u2")
    assert 50 < np.count_nonzero(scales == scales.min()) < 450  # both sides of the border


@pytest.mark.parametrize("name", MEMBERS)
def test_encoding_without_residual_makes_the_same_bytes_as_the_compiled_member(name: str) -> None:
    for kind in [*KINDS, ONCE]:
        encoding, values = member(name), values_of(kind, 5001, np.random.default_rng(3))
        frame = on_torch.encode(encoding, torch.from_numpy(values))
        assert frame.numpy().tobytes() == encoded(encoding, values).tobytes(), kind


@pytest.mark.parametrize("name", MEMBERS)
def test_values_stay_as_they_are_and_a_frame_is_memory_of_its_own(name: str) -> None:
    encoding, values = member(name), torch.from_numpy(normal(3000))
    before = values.clone()
    for residual in (None, torch.zeros(3000)):
        on_torch.encode(encoding, values, residual).zero_()
    assert torch.equal(values, before)


@pytest.mark.parametrize("name", MEMBERS)
def test_parameters_that_require_gradients_are_encoded_without_a_graph(name: str) -> None:
    encoding, parameter = member(name), torch.nn.Parameter(torch.from_numpy(normal(100)))
    frame = on_torch.encode(encoding, parameter, torch.zeros(100))
    on_torch.decode_add_(encoding, frame, parameter)
    assert parameter.grad_fn is None
    assert not on_torch.decode(encoding, frame, 100).requires_grad


@pytest.mark.parametrize("name", MEMBERS)
def test_frame_may_begin_at_any_byte_and_is_not_changed(name: str) -> None:
    encoding = member(name)
    frame = on_torch.encode(encoding, torch.from_numpy(normal(3000)))
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), frame])[3:]
    assert torch.equal(on_torch.decode(encoding, shifted, 3000), on_torch.decode(encoding, frame, 3000))
    assert torch.equal(shifted, frame)


@pytest.mark.parametrize("elements", [0, 1, 5000])
@pytest.mark.parametrize("name", MEMBERS)
def test_nothing_waits_for_the_device(name: str, elements: int) -> None:
    """Tensors without memory know shapes only: a size that hung on a value, or a value read back, would raise."""
    encoding = member(name)
    values, residual = (torch.empty(elements, device="meta") for _ in range(2))
    frame = on_torch.encode(encoding, values, residual)
    assert frame.shape == (encoding.frame_bytes(elements),)
    assert on_torch.decode(encoding, frame, elements).shape == (elements,)
    on_torch.decode_add_(encoding, frame, residual)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", MEMBERS)
def test_frame_of_values_that_are_not_finite_is_refused(name: str, bad: float) -> None:
    encoding, values = member(name), normal(200)
    values[130] = bad
    frame = on_torch.encode(encoding, torch.from_numpy(values)).numpy()
    with pytest.raises(EncodingError) as refusal:
        encoding.check(frame, 200)
    assert refusal.value.code == "not-finite"


@pytest.mark.parametrize("name", MEMBERS)
def test_frame_of_another_size_is_refused(name: str) -> None:
    encoding, out = member(name), torch.zeros(100)
    frame = on_torch.encode(encoding, torch.ones(100))
    for wrong in (frame[:-1], torch.cat([frame, frame[:1]]), frame[:0]):
        for decode in (
            lambda wrong: on_torch.decode(encoding, wrong, 100),
            lambda wrong: on_torch.decode_add_(encoding, wrong, out),
        ):
            with pytest.raises(EncodingError) as refusal:
                decode(wrong)
            assert refusal.value.code == "wrong-size"
    assert not out.any()


@pytest.mark.parametrize("tile", [8, 64])
@pytest.mark.parametrize("elements", [0, 1, 9, 2048, 5000])
def test_number_kept_by_topk_follows_from_the_size_of_its_frame(tile: int, elements: int) -> None:
    for density in (1e-9, 0.01, 0.3, 1.0):
        size = member("topk", tile, density).frame_bytes(elements)
        kept = min(elements, max(1, int(np.ceil(density * elements))))
        assert topk.kept_in(tile, size, elements) == kept


def test_tensors_that_are_no_block_are_refused_by_name() -> None:
    encoding, values = member("int8"), torch.zeros(64)
    frame = on_torch.encode(encoding, values)
    with pytest.raises(TypeError, match=r"values is torch\.float64"):
        on_torch.encode(encoding, values.double())
    with pytest.raises(TypeError, match=r"values .* shape \(8, 8\)"):
        on_torch.encode(encoding, values.view(8, 8))
    with pytest.raises(TypeError, match="residual .*contiguous: False"):
        on_torch.encode(encoding, values, torch.zeros(128)[::2])
    with pytest.raises(TypeError, match="residual has 63 elements on cpu; it must have 64"):
        on_torch.encode(encoding, values, torch.zeros(63))
    with pytest.raises(TypeError, match="residual has 64 elements on meta; it must have 64 on cpu"):
        on_torch.encode(encoding, values, torch.zeros(64, device="meta"))
    with pytest.raises(TypeError, match=r"frame is torch\.int8"):
        on_torch.decode(encoding, frame.view(torch.int8), 64)
    with pytest.raises(TypeError, match=r"out is torch\.float16"):
        on_torch.decode_add_(encoding, frame, values.half())
    with pytest.raises(TypeError, match="out is on meta, frame on cpu"):
        on_torch.decode_add_(encoding, frame, torch.zeros(64, device="meta"))


def test_stochastic_rounding_is_refused_with_the_mend() -> None:
    encoding = make_encoding("int4", EncodingOptions(rounding="stochastic"))
    with pytest.raises(ValueError, match="use rounding nearest, or copy the values to the host"):
        on_torch.encode(encoding, torch.zeros(64))


def test_no_other_module_of_paramserver_imports_torch() -> None:
    package = Path(paramserver.__file__).parent
    names = [
        ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for path in sorted(package.rglob("*.py"))
        if "on_torch" not in path.parts
    ]
    assert "paramserver.encoding.base" in names
    script = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
print("torch" in sys.modules)
importlib.import_module("paramserver.encoding.on_torch")
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["False", "True"], done.stderr
