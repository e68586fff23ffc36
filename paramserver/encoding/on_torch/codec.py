"""encode, decode and decode_add_ for every deterministic encoding, on the device where the tensors are.

All of it is queued on the device: nothing waits for a result, and no size depends on one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paramserver.encoding.base import Encoding, EncodingError
from paramserver.encoding.on_torch import tiled, topk
from paramserver.encoding.on_torch.members import MEMBERS, Member
from paramserver.encoding.on_torch.packing import bits_of, float32_of, from_upper_halves, upper_halves
from paramserver.encoding.on_torch.scales import INFINITY, MAGNITUDE, nearest_upper_half

_LARGEST_BF16 = 0x7F7F0000
_QUIET = 0x00400000  # a bit of every NaN


@torch.no_grad()
def encode(encoding: Encoding, values: Tensor, residual: Tensor | None = None) -> Tensor:
    """Encode values (n,) + residual (n,) as one frame (bytes,) uint8, new, on their device.

    The same bytes and the same residual as `encoding.encode` gives. `residual` is changed in place to what the
    frame does not hold; `values` is not changed. Both are flat, contiguous float32 and finite, and may not overlap.

    Raises:
        TypeError: for tensors of another type, shape or device.
        ValueError: for stochastic rounding, which only `encoding.encode` does, and an encoding unknown here.
    """
    _expect(values, torch.float32, "values")
    if encoding.options.rounding != "nearest":
        raise ValueError(
            f"{encoding.identifier} with rounding {encoding.options.rounding!r} is encoded on the host only; "
            "use rounding nearest, or copy the values to the host and call encoding.encode"
        )
    if residual is None:
        return _encode(encoding, values)[0]
    _expect(residual, torch.float32, "residual", like=values)
    total = values + residual
    frame, held = _encode(encoding, total)
    torch.sub(total, held, out=residual)
    return frame


@torch.no_grad()
def decode(encoding: Encoding, frame: Tensor, elements: int) -> Tensor:
    """The values (elements,) float32 that a frame (bytes,) uint8 holds: new, on the frame's device.

    The frame must have passed `encoding.check` on the host; it may begin at any byte. Raises EncodingError
    ("wrong-size") for a frame of another block's size, TypeError for a tensor that is no frame, ValueError for an
    encoding unknown here.
    """
    _expect(frame, torch.uint8, "frame")
    match encoding.name:
        case "fp32":
            _check_size(encoding, frame, elements, 4 * elements)
            return frame.clone().view(torch.float32)
        case "bf16":
            _check_size(encoding, frame, elements, 2 * elements)
            return from_upper_halves(frame)
        case "topk":
            positions, kept = topk.decode(encoding.tile, _kept(encoding, frame, elements), frame, elements)
            values = torch.zeros(elements, dtype=torch.float32, device=frame.device)
            values[positions] = kept
            return values
        case _:
            member = _member(encoding)
            _check_size(encoding, frame, elements, tiled.frame_bytes(member, encoding.tile, elements))
            return tiled.decode(member, encoding.tile, frame, elements)


@torch.no_grad()
def decode_add_(encoding: Encoding, frame: Tensor, out: Tensor) -> None:
    """out (n,) += the values of a frame: how a delta reaches a replica. Conditions and errors as of `decode`.

    `out` is flat, contiguous float32 on the frame's device.
    """
    _expect(frame, torch.uint8, "frame")
    _expect(out, torch.float32, "out")
    if out.device != frame.device:
        raise TypeError(f"out is on {out.device}, frame on {frame.device}; they must be on one device")
    out.add_(decode(encoding, frame, out.numel()))


def _encode(encoding: Encoding, values: Tensor) -> tuple[Tensor, Tensor]:
    """The frame of values (n,), and the values (n,) that it holds."""
    match encoding.name:
        case "fp32":
            return values.clone().view(torch.uint8), values
        case "bf16":
            bits = _bf16_bits(values)
            return upper_halves(bits), float32_of(bits)
        case "topk":
            size = encoding.frame_bytes(values.numel())
            kept = topk.kept_in(encoding.tile, size, values.numel())
            if kept is None:
                raise RuntimeError(f"{encoding.identifier} counts {size} bytes for {values.numel()} elements")
            return topk.encode(encoding.tile, kept, values)
        case _:
            return tiled.encode(_member(encoding), encoding.tile, values)


def _bf16_bits(values: Tensor) -> Tensor:
    """The bits of values rounded to bfloat16, never up to infinity; what is not finite stays so."""
    bits = bits_of(values)
    magnitudes = bits & MAGNITUDE
    rounded = nearest_upper_half(magnitudes).clamp(max=_LARGEST_BF16)
    rounded = torch.where(magnitudes < INFINITY, rounded, (magnitudes | _QUIET) & ~0xFFFF)
    return rounded | (bits ^ magnitudes)


def _member(encoding: Encoding) -> Member:
    try:
        return MEMBERS[encoding.name]
    except KeyError:
        known = ", ".join(sorted(["fp32", "bf16", "topk", *MEMBERS]))
        raise ValueError(f"encoding {encoding.identifier!r} has no torch member (those that have: {known})") from None


def _kept(encoding: Encoding, frame: Tensor, elements: int) -> int:
    kept = topk.kept_in(encoding.tile, frame.numel(), elements)
    if kept is None:
        raise EncodingError(
            "wrong-size",
            f"a frame of {frame.numel()} bytes, which no {encoding.identifier} of a block of {elements} elements has",
        )
    return kept


def _check_size(encoding: Encoding, frame: Tensor, elements: int, size: int) -> None:
    if frame.numel() != size:
        raise EncodingError(
            "wrong-size",
            f"a frame of {frame.numel()} bytes, but a block of {elements} elements in {encoding.identifier} "
            f"takes {size}",
        )


def _expect(tensor: Tensor, dtype: torch.dtype, name: str, like: Tensor | None = None) -> None:
    """Raise TypeError unless the tensor is flat, contiguous, of `dtype`, and of the size and device of `like`."""
    if tensor.dtype != dtype or tensor.ndim != 1 or not tensor.is_contiguous():
        raise TypeError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} (contiguous: {tensor.is_contiguous()}); "
            f"it must be a flat, contiguous {dtype} tensor"
        )
    if like is not None and (tensor.shape != like.shape or tensor.device != like.device):
        raise TypeError(
            f"{name} has {tensor.numel()} elements on {tensor.device}; it must have {like.numel()} on {like.device}"
        )
