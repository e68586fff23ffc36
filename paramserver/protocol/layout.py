"""The layout: the ordered list of a model's blocks. It is pure data and knows no tensor library.

A parameter tensor is cut, flattened in C order, into blocks of at most `BLOCK_ELEMENTS`. Everything
that is placed, versioned or transferred is a block; the fingerprint lets two processes check in one
comparison that they speak of the same blocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Annotated

import msgspec

BLOCK_ELEMENTS = 2**18
MAX_BLOCKS = 2**20
MAX_SIDES = 64


class LayoutError(ValueError):
    """A layout that no model can have: an empty or repeated parameter, or more blocks than allowed."""


class Parameter(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of the model. `group` names what is pulled together: one layer, one expert."""

    name: str
    shape: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_SIDES)]
    group: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Block(msgspec.Struct, frozen=True, array_like=True):
    """Elements [start, start + elements) of a parameter, flattened in C order."""

    index: int
    parameter: str
    start: int
    elements: int
    group: str


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """The ordered blocks of a model, all phases included. Make one with `cut_layout`."""

    parameters: tuple[Parameter, ...]
    blocks: tuple[Block, ...]
    dtype: str = "float32"

    @property
    def elements(self) -> int:
        return sum(block.elements for block in self.blocks)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over names, shapes, groups, dtype and cut."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:16]


def cut_layout(parameters: Iterable[Parameter], block_elements: int = BLOCK_ELEMENTS) -> Layout:
    """Cut parameters into blocks, in the order given.

    Raises LayoutError for a repeated name, a parameter without elements, or too many blocks.
    """
    parameters = tuple(parameters)
    blocks: list[Block] = []
    seen: set[str] = set()
    for parameter in parameters:
        if parameter.name in seen:
            raise LayoutError(f"parameter {parameter.name!r} is declared twice; give each tensor its own name")
        seen.add(parameter.name)
        if parameter.elements <= 0 or any(side <= 0 for side in parameter.shape):
            raise LayoutError(
                f"parameter {parameter.name!r} has shape {parameter.shape}, which holds no element; "
                "every side must be at least 1"
            )
        # Before cutting: a peer's layout may claim any shape.
        if len(blocks) + -(-parameter.elements // block_elements) > MAX_BLOCKS:
            raise LayoutError(f"the model cuts into more than {MAX_BLOCKS} blocks of {block_elements} elements")
        for start in range(0, parameter.elements, block_elements):
            size = min(block_elements, parameter.elements - start)
            blocks.append(Block(len(blocks), parameter.name, start, size, parameter.group))
    if not blocks:
        raise LayoutError("the model declares no parameter; a layout needs at least one")
    return Layout(parameters, tuple(blocks))


def check_layout(layout: Layout) -> None:
    """Check a layout that came from a peer: its blocks must be some cut of its parameters."""
    largest = max((block.elements for block in layout.blocks), default=0)
    if not 0 < largest <= BLOCK_ELEMENTS:
        raise LayoutError(f"the largest block has {largest} elements; allowed are 1 to {BLOCK_ELEMENTS}")
    if layout.dtype != "float32":
        raise LayoutError(f"dtype {layout.dtype!r} is not supported; allowed is 'float32'")
    # A parameter smaller than the cut says nothing of it, so the cut is the largest block's size.
    if cut_layout(layout.parameters, largest).blocks != layout.blocks:
        raise LayoutError("the blocks are no contiguous cut of the parameters")
