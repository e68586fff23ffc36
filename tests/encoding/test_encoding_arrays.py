"""Arrays for kernels: zeros at the start of a cache line, and apart from each other in their pages."""

from __future__ import annotations

import numpy as np
import pytest

from paramserver.encoding import aligned_zeros
from paramserver.encoding.frames import expect_float32


@pytest.mark.parametrize("elements", [0, 1, 63, 5003, 2**18])
def test_arrays_are_zeros_that_kernels_take_at_the_start_of_a_line(elements: int) -> None:
    for place in range(3):
        array = aligned_zeros(elements, place)
        expect_float32(array, "array", elements)
        assert not array.any()
        if elements:
            assert array.ctypes.data % 64 == 0


def test_places_lie_apart_in_a_page_and_share_no_memory() -> None:
    arrays = [aligned_zeros(2**18, place) for place in range(3)]
    assert len({array.ctypes.data % 4096 for array in arrays}) == 3
    assert not any(np.shares_memory(one, other) for one in arrays for other in arrays if one is not other)
