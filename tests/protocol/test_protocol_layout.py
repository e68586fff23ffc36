"""The layout: its blocks tile the parameters exactly, and a peer's layout is checked before it is used."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.protocol.layout import (
    BLOCK_ELEMENTS,
    MAX_SIDES,
    Block,
    Layout,
    LayoutError,
    Parameter,
    check_layout,
    cut_layout,
)

shapes = st.lists(st.integers(1, 9), max_size=4).map(tuple)
parameter_lists = st.lists(shapes, min_size=1, max_size=6).map(
    lambda found: [Parameter(f"p{i}", shape, f"g{i % 2}") for i, shape in enumerate(found)]
)


@given(parameter_lists, st.integers(1, 300))
def test_blocks_tile_every_parameter_in_order_without_gap_or_overlap(parameters: list[Parameter], cut: int) -> None:
    layout = cut_layout(parameters, cut)
    assert [block.index for block in layout.blocks] == list(range(len(layout.blocks)))
    assert layout.elements == sum(math.prod(parameter.shape) for parameter in parameters)
    for parameter in parameters:
        blocks = [block for block in layout.blocks if block.parameter == parameter.name]
        at = 0
        for block in blocks:
            assert block.start == at
            assert 0 < block.elements <= cut
            assert block.group == parameter.group
            at += block.elements
        assert at == parameter.elements
        assert all(block.elements == cut for block in blocks[:-1])


@given(parameter_lists, st.integers(1, 300))
def test_a_cut_layout_passes_the_check_also_after_travelling(parameters: list[Parameter], cut: int) -> None:
    layout = cut_layout(parameters, cut)
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=Layout)
    check_layout(arrived)
    assert arrived.fingerprint == layout.fingerprint


@given(parameter_lists, st.data())
def test_a_layout_with_a_changed_block_is_refused(parameters: list[Parameter], data: st.DataObject) -> None:
    layout = cut_layout(parameters, 100)
    at = data.draw(st.integers(0, len(layout.blocks) - 1))
    field = data.draw(st.sampled_from(["index", "start", "elements"]))
    block = layout.blocks[at]
    changed = msgspec.structs.replace(block, **{field: getattr(block, field) + 1})
    blocks = (*layout.blocks[:at], changed, *layout.blocks[at + 1 :])
    with pytest.raises(LayoutError):
        check_layout(msgspec.structs.replace(layout, blocks=blocks))


def test_the_fingerprint_tells_names_shapes_groups_and_cuts_apart() -> None:
    layouts = [
        cut_layout([Parameter("a", (4, 6), "g")]),
        cut_layout([Parameter("b", (4, 6), "g")]),
        cut_layout([Parameter("a", (6, 4), "g")]),
        cut_layout([Parameter("a", (4, 6), "h")]),
        cut_layout([Parameter("a", (4, 6), "g")], 8),
    ]
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)
    assert len(layouts[0].fingerprint) == 16


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ([], "no parameter"),
        ([Parameter("a", (1,), "g"), Parameter("a", (2,), "g")], "declared twice"),
        ([Parameter("a", (3, 0), "g")], "no element"),
        ([Parameter("a", (-2, -3), "g")], "no element"),
    ],
)
def test_a_layout_that_no_model_can_have_is_refused(parameters: list[Parameter], reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        cut_layout(parameters)


@pytest.mark.timeout(10)
def test_a_peer_that_claims_a_huge_shape_is_refused_at_once() -> None:
    huge = Layout((Parameter("a", (2**63,) * MAX_SIDES, "g"),), (Block(0, "a", 0, 1, "g"),))
    with pytest.raises(LayoutError, match="more than"):
        check_layout(huge)


def test_a_shape_with_too_many_sides_does_not_decode() -> None:
    sides = msgspec.msgpack.encode(["a", [1] * (MAX_SIDES + 1), "g"])
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(sides, type=Parameter)


def test_a_foreign_dtype_and_an_oversized_block_are_refused() -> None:
    layout = cut_layout([Parameter("a", (4,), "g")])
    with pytest.raises(LayoutError, match="dtype"):
        check_layout(msgspec.structs.replace(layout, dtype="float64"))
    with pytest.raises(LayoutError, match="largest block"):
        check_layout(cut_layout([Parameter("a", (BLOCK_ELEMENTS + 1,), "g")], BLOCK_ELEMENTS + 1))
    with pytest.raises(LayoutError, match="largest block"):
        check_layout(msgspec.structs.replace(layout, blocks=()))
