"""Placement of blocks on shards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.coordinator.placement import PlacementError, balance
from paramserver.protocol.layout import Layout, Parameter, cut_layout


def make_layout(sizes: list[int]) -> Layout:
    return cut_layout([Parameter(f"p{i}", (size,), "all") for i, size in enumerate(sizes)], 1000)


@given(st.lists(st.integers(1, 3000), min_size=4, max_size=30), st.integers(1, 4))
def test_every_block_is_placed_once_and_loads_differ_by_at_most_one_block(sizes: list[int], shards: int) -> None:
    layout = make_layout(sizes)
    placed = balance(layout, [f"shard-{i}" for i in range(shards)], shards)
    assert sorted(block for blocks in placed.values() for block in blocks) == list(range(len(layout.blocks)))
    loads = [sum(layout.blocks[block].elements for block in blocks) for blocks in placed.values()]
    assert max(loads) - min(loads) <= max(block.elements for block in layout.blocks)


def test_placement_does_not_depend_on_the_order_of_names() -> None:
    layout = make_layout([5, 5, 700, 20, 900])
    assert balance(layout, ["b", "a", "c"], 2) == balance(layout, ["c", "b", "a"], 2)


def test_more_shards_than_blocks_is_an_error_that_names_the_mend() -> None:
    with pytest.raises(PlacementError, match=r"more shards than blocks.*lower cluster\.shards to 2"):
        balance(make_layout([5, 5]), ["a", "b", "c"], 3)


def test_shards_beyond_the_number_of_blocks_are_left_out() -> None:
    assert balance(make_layout([5, 5]), ["a", "b", "c"], 2) == {"a": (0,), "b": (1,)}
