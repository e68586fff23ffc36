"""Frames of one scale a tile and one code an element: [scales: bf16] [codes]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from paramserver.encoding.on_torch.members import Member
from paramserver.encoding.on_torch.packing import (
    bits_of,
    from_upper_halves,
    pack,
    packed_bytes,
    unpack,
    upper_halves,
)


def tiles_of(elements: int, tile: int) -> int:
    return -(-elements // tile)


def frame_bytes(member: Member, tile: int, elements: int) -> int:
    return 2 * tiles_of(elements, tile) + packed_bytes(elements, member.places)


def encode(member: Member, tile: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """The frame (bytes,) uint8 of values (n,), and the values (n,) that it holds."""
    scales, stored, held = quantise(member, tile, values)
    return torch.cat([scales, pack(stored, member.places, member.base, member.filler)]), held


def decode(member: Member, tile: int, frame: Tensor, elements: int) -> Tensor:
    """The values (elements,) that a frame of the right size holds."""
    cut = 2 * tiles_of(elements, tile)
    stored = unpack(frame[cut:], elements, member.places, member.base)
    return restore(member, tile, frame[:cut], stored)


def quantise(member: Member, tile: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values (n,) as the bytes of their scales, their stored codes (n,) uint8, and code x scale (n,)."""
    elements = values.numel()
    tiles = _in_tiles(values, tile)  # (t, tile)
    counts = torch.full((tiles.shape[0], 1), tile, dtype=torch.float32, device=values.device)
    if elements % tile:
        counts[-1] = elements % tile
    largest = tiles.abs().amax(dim=1, keepdim=True)  # (t, 1), NaN where one is
    scales = member.scales(tiles, largest, counts)
    scales = scales.masked_fill(~torch.isfinite(largest), torch.inf)  # for `check` to find
    stored = member.store(tiles, scales)
    held = member.levels(stored) * scales
    return upper_halves(bits_of(scales.view(-1))), stored.view(-1)[:elements], held.view(-1)[:elements]


def restore(member: Member, tile: int, scales: Tensor, stored: Tensor) -> Tensor:
    """code x scale (n,) of stored codes (n,) and the bytes of their scales."""
    levels = _in_tiles(member.levels(stored), tile)
    return (levels * from_upper_halves(scales)[:, None]).view(-1)[: stored.numel()]


def _in_tiles(values: Tensor, tile: int) -> Tensor:
    """Values (n,) as tiles (t, tile), the last one filled up with zeros."""
    return pad(values, (0, -values.numel() % tile)).view(-1, tile)
