"""The levels of `adaptive`: how a segment of 2,048 elements may be encoded. They are those of members of the family."""

from __future__ import annotations

SEGMENT = 2048  # elements that share a level; codes of the family are packed in runs of as many

SKIP, SIGN, TERNARY, INT4, INT8 = range(5)
LEVELS = 5
PLACES = (0, 8, 5, 2, 1)  # codes a byte, by level


def segments_of(elements: int) -> int:
    return -(-elements // SEGMENT)


def level_bytes(level: int, elements: int, tile: int) -> int:
    """What a segment of so many elements takes at a level, its level byte not counted."""
    return 0 if level == SKIP else 2 * -(-elements // tile) + -(-elements // PLACES[level])
