"""Codes to bytes and back, and numbers as little-endian bytes. Nothing here waits for a device.

docs/encodings.md, "Frames": codes are packed in runs of 2,048 elements, byte j of a run of m holding
elements j, j + B, j + 2B, ..., with B = ceil(m / places) and the first one in the lowest place.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn.functional import pad

if sys.byteorder != "little":
    raise ImportError("paramserver's encodings need a little-endian machine: the wire format is little-endian")

RUN = 2048


def packed_bytes(elements: int, places: int) -> int:
    """How many bytes the codes of so many elements take."""
    return elements // RUN * -(-RUN // places) + -(-(elements % RUN) // places)


def pack(codes: Tensor, places: int, base: int, filler: int) -> Tensor:
    """Stored codes (n,) uint8, each below `base`, as bytes (packed_bytes,). Places without an element hold `filler`."""
    if places == 1:
        return codes
    whole = codes.numel() // RUN * RUN
    parts = [
        pack_planar(codes[:whole].view(-1, RUN), places, base, filler),
        pack_planar(codes[whole:].view(1, -1), places, base, filler),
    ]
    return torch.cat([part.reshape(-1) for part in parts])


def unpack(packed: Tensor, elements: int, places: int, base: int) -> Tensor:
    """The stored codes (elements,) uint8 of bytes that `pack` made."""
    if places == 1:
        return packed
    whole_runs, rest = divmod(elements, RUN)
    cut = whole_runs * -(-RUN // places)
    parts = [
        unpack_planar(packed[:cut].view(whole_runs, -1 if whole_runs else 0), RUN, places, base),
        unpack_planar(packed[cut:].view(1, -1), rest, places, base),
    ]
    return torch.cat([part.reshape(-1) for part in parts])


def pack_planar(codes: Tensor, places: int, base: int, filler: int) -> Tensor:
    """Runs of codes (runs, m) uint8 as bytes (runs, B)."""
    runs, elements = codes.shape
    width = -(-elements // places)
    codes = pad(codes, (0, places * width - elements), value=filler).view(runs, places, width)
    packed = codes[:, places - 1].clone()
    for place in reversed(range(places - 1)):
        packed.mul_(base).add_(codes[:, place])
    return packed


def unpack_planar(packed: Tensor, elements: int, places: int, base: int) -> Tensor:
    """The codes (runs, elements) uint8 of bytes (runs, B)."""
    digits = []
    for _ in range(places - 1):
        rest = packed.div(base, rounding_mode="floor")
        digits.append(packed - rest * base)
        packed = rest
    # (runs, places, B) in memory: a run's elements in order, then its filler.
    return torch.stack([*digits, packed], dim=1).flatten(1)[:, :elements]


def bits_of(values: Tensor) -> Tensor:
    """The bits of float32 values as int32: a view. Magnitudes order as their bits do."""
    return values.view(torch.int32)


def float32_of(bits: Tensor) -> Tensor:
    """The float32 values that int32 bits stand for: a view."""
    return bits.view(torch.float32)


def upper_halves(bits: Tensor) -> Tensor:
    """The upper halves of int32 (n,) as bytes (2n,): float32 values as bfloat16, where the lower halves are zero."""
    return (bits >> 16).to(torch.int16).view(torch.uint8)


def from_upper_halves(halves: Tensor) -> Tensor:
    """The float32 values (n,) of bfloat16 bytes (2n,) of any alignment."""
    return halves.clone().view(torch.bfloat16).to(torch.float32)
