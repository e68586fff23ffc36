"""Every encoding written once more, slowly and in plain numpy, from docs/encodings.md alone.

Tests compare bytes with it; nothing here is shared with the members or their kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

RUN = 2048
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LIMITS = {"int8": 127, "int4": 7, "fp4": 6, "int2": 2}
RANGES = {"int8": (-127, 127), "int4": (-7, 7), "int2": (-2, 1), "ternary": (-1, 1)}
PLACES = {"int8": 1, "int4": 2, "fp4": 2, "int2": 4, "ternary": 5, "sign": 8}
BASES = {"int8": 256, "int4": 16, "fp4": 16, "int2": 4, "ternary": 3, "sign": 2}
TILED = sorted(PLACES)


@dataclass
class Encoded:
    frame: Bytes
    residual: Float32
    decoded: Float32
    scales: Float32  # one a tile


def bf16_bytes(scales: Float32) -> Bytes:
    bits = scales.view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype("<u2").view(np.uint8)


def clamped(bits: int, is_zero: bool) -> np.float32:
    """The scale of these bits, within its limits."""
    scale = np.uint32(bits).view(np.float32)
    if is_zero:
        return np.float32(0)
    return min(max(scale, np.float32(2.0**-126)), np.float32(2.0**120))


def rounded_up(largest: np.float32, limit: int) -> np.float32:
    bits = int(np.float32(largest / np.float32(limit)).view(np.uint32))
    return clamped(-(-bits // 2**16) * 2**16, largest == 0)


def rounded_to_nearest(mean: np.float32) -> np.float32:
    low, rest = divmod(int(mean.view(np.uint32)), 2**16)
    up = rest > 2**15 or (rest == 2**15 and low % 2 == 1)
    return clamped((low + up) * 2**16, mean == 0)


def lane_sum(magnitudes: Float32, tile: int) -> np.float32:
    width = min(tile, 64)
    lanes = [np.float32(0)] * width
    for place, magnitude in enumerate(magnitudes):
        lanes[place % width] = lanes[place % width] + magnitude
    while width > 1:
        width //= 2
        lanes = [lanes[lane] + lanes[lane + width] for lane in range(width)]
    return lanes[0]


def mean_of(magnitudes: Float32, tile: int, count: int) -> np.float32:
    return min(lane_sum(magnitudes, tile) / np.float32(count), np.float32(2.0**120))


def scale_of(name: str, values: Float32, tile: int) -> np.float32:
    magnitudes = np.abs(values)
    largest = magnitudes.max()
    if not np.isfinite(values).all():
        return np.float32(np.inf)
    if name == "int2":
        sign = np.float32(-1 if largest in values else 1)
        return np.float32(0) if largest == 0 else sign * rounded_up(largest, 2)
    if name in LIMITS:
        return rounded_up(largest, LIMITS[name])
    mean = mean_of(magnitudes, tile, values.size)
    if name == "ternary":
        is_large = magnitudes > np.float32(0.75) * mean
        large = np.where(is_large, magnitudes, np.float32(0))
        mean = mean_of(large, tile, is_large.sum()) if is_large.any() else np.float32(0)
    return rounded_to_nearest(mean)


def codes_of(name: str, values: Float32, scale: np.float32) -> npt.NDArray[np.float64]:
    if name == "sign":
        return np.where(values < 0, -1.0, 1.0)
    inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
    scaled = values * inverse
    if name != "fp4":
        return np.clip(np.rint(scaled).astype(np.float64), *RANGES[name])
    codes = []
    for value in scaled.astype(np.float64):
        distances = np.abs(E2M1 - abs(value))
        nearest = np.flatnonzero(distances == distances.min())
        even = next((index for index in nearest if index % 2 == 0), nearest[0])
        codes.append(math.copysign(E2M1[even], value))
    return np.array(codes)


def digits_of(name: str, codes: npt.NDArray[np.float64]) -> Integers:
    match name:
        case "int8":
            return codes.astype(np.int64) % 256
        case "int4":
            return codes.astype(np.int64) + 8
        case "int2":
            return codes.astype(np.int64) + 2
        case "ternary":
            return codes.astype(np.int64) + 1
        case "sign":
            return (codes < 0).astype(np.int64)
        case _:
            return np.searchsorted(E2M1, np.abs(codes)) + 8 * (codes < 0)


def packed(name: str, digits: Integers) -> Bytes:
    places, base = PLACES[name], BASES[name]
    zero = int(digits_of(name, np.zeros(1))[0])
    parts = []
    for start in range(0, digits.size, RUN):
        run = digits[start : start + RUN]
        size = -(-run.size // places)
        full = np.full(size * places, zero, np.int64)
        full[: run.size] = run
        parts.append(sum(full[place * size : (place + 1) * size] * base**place for place in range(places)))
    return np.concatenate([np.zeros(0), *parts]).astype(np.uint8)


def encode(name: str, tile: int, values: Float32, residual: Float32, density: float = 0.01) -> Encoded:
    with np.errstate(over="ignore", invalid="ignore"):
        total = values + residual
        if name == "topk":
            return _topk(total, tile, density)
        starts = range(0, total.size, tile)
        scales = np.array([scale_of(name, total[start : start + tile], tile) for start in starts], np.float32)
        parts = [
            codes_of(name, total[start : start + tile], scale) for start, scale in zip(starts, scales, strict=True)
        ]
        codes = np.concatenate([np.zeros(0), *parts])
        decoded = codes.astype(np.float32) * np.repeat(scales, tile)[: total.size]
        frame = np.concatenate([bf16_bytes(scales), packed(name, digits_of(name, codes))])
        return Encoded(frame, total - decoded, decoded, scales)


def _topk(total: Float32, tile: int, density: float) -> Encoded:
    kept = min(total.size, max(1, math.ceil(density * total.size)))
    places = np.sort(np.argsort(-np.abs(total), kind="stable")[:kept])
    inner = encode("int8", tile, total[places], np.zeros(kept, np.float32))
    counts = np.bincount(places // RUN, minlength=-(-total.size // RUN)).astype("<u2").view(np.uint8)
    offsets = places % RUN
    half = -(-kept // 2)
    high = np.zeros(2 * half, np.int64)
    high[:kept] = offsets // 256
    frame = np.concatenate(
        [counts, (offsets % 256).astype(np.uint8), (high[:half] + 16 * high[half:]).astype(np.uint8), inner.frame]
    )
    decoded = np.zeros_like(total)
    decoded[places] = inner.decoded
    return Encoded(frame, total - decoded, decoded, inner.scales)
