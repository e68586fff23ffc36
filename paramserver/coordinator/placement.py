"""Placement: block -> shard, balanced by bytes. The same layout and shards always give the same placement."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from paramserver.protocol.layout import Layout


class PlacementError(ValueError):
    """Blocks that cannot be placed as the job asks; the text says why and how to mend it."""


@dataclass(frozen=True)
class PlacedShard:
    """One shard's part. The incarnation says which process holds it: its successor would hold nothing."""

    name: str
    incarnation: int
    address: str
    blocks: tuple[int, ...]
    key: str = ""  # its public key, where the cluster uses keys


@dataclass(frozen=True)
class Placement:
    """`term` only grows."""

    term: int
    shards: tuple[PlacedShard, ...]


def balance(layout: Layout, shards: Sequence[str], wanted: int) -> dict[str, tuple[int, ...]]:
    """Blocks for each shard: largest first, each to the shard with the fewest bytes so far.

    Args:
        shards: names of those that are there; where they are more than the blocks, the last ones get none
            and are left out.
        wanted: cluster.shards of the job. Raises PlacementError when the model has fewer blocks than that.
    """
    if wanted > len(layout.blocks):
        raise PlacementError(
            f"cluster.shards is {wanted}, but the model has only {len(layout.blocks)} block(s): more shards than "
            f"blocks; lower cluster.shards to {len(layout.blocks)} or fewer"
        )
    names = sorted(shards)[: len(layout.blocks)]
    placed: list[list[int]] = [[] for _ in names]
    loads = [(0, position) for position in range(len(names))]
    for block in sorted(layout.blocks, key=lambda block: (-block.elements, block.index)):
        load, position = heapq.heappop(loads)
        placed[position].append(block.index)
        heapq.heappush(loads, (load + 4 * block.elements, position))
    return {name: tuple(sorted(blocks)) for name, blocks in zip(names, placed, strict=True)}
