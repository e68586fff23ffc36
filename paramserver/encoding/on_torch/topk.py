"""topk: the elements of largest magnitude, of equals the first, as positions and int8 codes.

A frame is [kept in each run: uint16] [low bytes of the offsets in the runs] [their high 4 bits, two a byte]
[scales] [int8 codes], in ascending order of position. How many are kept follows from the frame's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paramserver.encoding.on_torch import tiled
from paramserver.encoding.on_torch.members import Int8
from paramserver.encoding.on_torch.packing import RUN, bits_of, pack_planar, unpack_planar
from paramserver.encoding.on_torch.scales import MAGNITUDE

_CODES = Int8()


def encode(tile: int, kept: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """The frame (bytes,) uint8 of values (n,) of which so many are kept, and the values (n,) that it holds."""
    magnitudes = bits_of(values) & MAGNITUDE
    # A stable sort keeps the first of equals in front.
    largest = magnitudes.sort(descending=True, stable=True).indices[:kept]
    positions = largest.sort().values
    scales, stored, restored = tiled.quantise(_CODES, tile, values[positions])
    held = torch.zeros_like(values)
    held[positions] = restored
    bounds = torch.arange(_runs(values.numel()) + 1, device=values.device) * RUN
    counts = torch.searchsorted(positions, bounds).diff()
    offsets = positions % RUN
    frame = [
        counts.to(torch.int16).view(torch.uint8),
        (offsets & 0xFF).to(torch.uint8),
        pack_planar((offsets >> 8).to(torch.uint8)[None], places=2, base=16, filler=0).view(-1),
        scales,
        stored,
    ]
    return torch.cat(frame), held


def decode(tile: int, kept: int, frame: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    """The positions (kept,) int64, ascending, and the values (kept,) that a checked frame holds."""
    runs = _runs(elements)
    counts, low, high, scales, stored = torch.split(frame, _parts(tile, kept, runs))
    run_of = torch.repeat_interleave(
        torch.arange(runs, device=frame.device), counts.clone().view(torch.int16).to(torch.int64), output_size=kept
    )
    offsets = low.to(torch.int64) + (unpack_planar(high[None], kept, places=2, base=16).view(-1).to(torch.int64) << 8)
    return run_of * RUN + offsets, tiled.restore(_CODES, tile, scales, stored)


def kept_in(tile: int, size: int, elements: int) -> int | None:
    """How many elements a frame of `size` bytes keeps of so many; None where no number gives that size."""
    runs = _runs(elements)
    low, high = 0, elements
    while low < high:
        middle = (low + high) // 2
        if sum(_parts(tile, middle, runs)) < size:
            low = middle + 1
        else:
            high = middle
    return low if sum(_parts(tile, low, runs)) == size else None


def _parts(tile: int, kept: int, runs: int) -> list[int]:
    """Bytes of the counts, low bytes, high bits, scales, codes."""
    return [2 * runs, kept, -(-kept // 2), 2 * tiled.tiles_of(kept, tile), kept]


def _runs(elements: int) -> int:
    return -(-elements // RUN)
