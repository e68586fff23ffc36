"""Parts of kernels whose faults the frames would hide: sums that are rounded afterwards, writes that nobody reads."""

from __future__ import annotations

import encoding_reference as reference
import numba
import numpy as np
import pytest

from paramserver.encoding.base import Float32
from paramserver.encoding.sparse.kernels import topk_run
from paramserver.encoding.sums.kernels import add_and_sum, add_and_sum_tiles, sum_above, sum_above_tiles


# numba types nothing it wraps.
@numba.njit  # type: ignore[untyped-decorator, unused-ignore]
def sums_of_one(values, totals, blocks, limit):  # type: ignore[no-untyped-def]
    total = add_and_sum(values, 0, totals, 0, blocks)
    return total, sum_above(totals, 0, blocks, limit)


@numba.njit  # type: ignore[untyped-decorator, unused-ignore]
def sums_of_sixteen(values, totals, limits, sums, above):  # type: ignore[no-untyped-def]
    add_and_sum_tiles(values, 0, totals, 0, sums, 0)
    sum_above_tiles(totals, 0, limits, above, 0)


@numba.njit  # type: ignore[untyped-decorator, unused-ignore]
def one_run(frame, elements, kept, start, count, first, out):  # type: ignore[no-untyped-def]
    return topk_run(64, frame, elements, kept, start, count, first, out)


def rough_values(elements: int) -> tuple[Float32, Float32, Float32]:
    """Values, residual and total, of many magnitudes: another order of additions gives another sum."""
    generator = np.random.default_rng(elements)
    values, residual = generator.standard_normal((2, elements)).astype(np.float32)
    values *= np.exp(3 * generator.standard_normal(elements)).astype(np.float32)
    return values, residual, values + residual


def above(total: Float32, limit: float) -> Float32:
    magnitudes = np.abs(total)
    return np.where(magnitudes > np.float32(limit), magnitudes, np.float32(0))


@pytest.mark.parametrize("tile", [64, 128, 2048])
def test_sums_of_a_tile_have_the_bits_of_the_written_order(tile: int) -> None:
    values, totals, total = rough_values(tile)
    everything, large = sums_of_one(values, totals, tile // 64, np.float32(0.7))
    assert everything == reference.lane_sum(np.abs(total), tile)
    assert large == reference.lane_sum(above(total, 0.7), tile)
    np.testing.assert_array_equal(totals, total)


def test_sums_of_sixteen_tiles_have_the_bits_of_the_written_order() -> None:
    values, totals, total = rough_values(16 * 64)
    limits = np.linspace(0.1, 2, 16).astype(np.float32)
    sums, large = np.zeros(16, np.float32), np.zeros(16, np.float32)
    sums_of_sixteen(values, totals, limits, sums, large)
    np.testing.assert_array_equal(totals, total)
    for tile, part in enumerate(total.reshape(16, 64)):
        assert sums[tile] == reference.lane_sum(np.abs(part), 64)
        assert large[tile] == reference.lane_sum(above(part, limits[tile]), 64)


@pytest.mark.parametrize("offset", [0, 1, 2, 2047, 2048, 4095])
def test_a_kept_element_is_never_written_beyond_its_run(offset: int) -> None:
    """Of a frame that nobody checked, too: one kept element in the second of two runs, which has two elements."""
    frame = np.array([0, 0, 1, 0, offset % 256, offset // 256, 0x80, 0x3F, 5], np.uint8)
    out = np.full(4096 + 16, 7, np.float32)
    assert one_run(frame, 2050, 1, 2048, 2, 0, out) == 1
    assert (out[2:] == 7).all()
    np.testing.assert_array_equal(out[:2], [5.0 if place == offset else 0.0 for place in range(2)])
