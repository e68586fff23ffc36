"""Placement: part -> primary, backup and term. The same layout and shards always give the same first placement.

A part is the blocks that share one journal, named after the shard that held it first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from paramserver.protocol.layout import Layout


class PlacementError(ValueError):
    """Blocks that cannot be placed as the job asks; the text says why and how to mend it."""


@dataclass(frozen=True)
class Holder:
    """The shard process that holds a part. Another one under the same name has another incarnation."""

    shard: str
    incarnation: int
    address: str
    key: str = ""  # its public key, where the cluster uses keys


@dataclass(frozen=True)
class PlacedPart:
    """`term` only grows: it is raised whenever another process becomes primary. So one term has one primary.

    `is_synced`: the backup stores all that workers were told, and it may be promoted. Without it the primary may go on
    alone: that is its grant, which is stored before the primary hears of it.
    """

    name: str
    term: int
    blocks: tuple[int, ...]
    primary: Holder
    weights_bytes: int  # of its blocks, at full precision
    backup: Holder | None = None
    is_synced: bool = False
    partnership: int = 0  # grows with every new backup, also with the same process again
    failovers: int = 0  # how often its backup became primary because the primary had died
    grants: int = 0  # how often its primary was allowed to go on without the backup that it waited for


@dataclass(frozen=True)
class Placement:
    parts: tuple[PlacedPart, ...]


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


def place(layout: Layout, shards: Mapping[str, Holder], wanted: int, has_backups: bool) -> Placement:
    """The first placement: parts balanced by bytes, each backed up by the next shard of the ring.

    Args:
        shards: those that are there, by name.
        wanted: as in `balance`, which raises PlacementError.
    """
    placed = balance(layout, list(shards), wanted)
    ring = sorted(shards)
    return Placement(
        tuple(
            PlacedPart(
                name=name,
                term=1,
                blocks=blocks,
                primary=shards[name],
                weights_bytes=sum(4 * layout.blocks[block].elements for block in blocks),
                backup=shards[after(ring, name)[0]] if has_backups and len(ring) > 1 else None,
                partnership=1,
            )
            for name, blocks in placed.items()
        )
    )


def after(ring: Sequence[str], name: str) -> list[str]:
    """The other names of a sorted ring, from the next one on; `name` need not be in it."""
    return [one for one in ring if one > name] + [one for one in ring if one < name]


def loads(parts: Iterable[PlacedPart], shards: Iterable[str]) -> dict[str, int]:
    """Bytes of weights that each of these shards holds, as primary and as backup."""
    found = dict.fromkeys(shards, 0)
    for part in parts:
        for holder in (part.primary, part.backup):
            if holder is not None and holder.shard in found:
                found[holder.shard] += part.weights_bytes
    return found
