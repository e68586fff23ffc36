"""The interface of a low-resolution encoding, and the register of the family.

An encoding turns n float32 values into one frame of bytes and back. It is stateless: the residual
(what rounding lost, error feedback) is kept by whoever encodes and handed in. One file a member.

docs/encodings.md has every frame's layout and rounding.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from paramserver.protocol.messages import RefusalCode

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

DEFAULT_TILE = 64


class EncodingError(ValueError):
    """A frame that is no encoding of the block. `code` is the refusal's name: "wrong-size", "not-finite" or
    "corrupt-frame"; a name or option that is none gives "unknown-encoding"."""

    def __init__(self, code: RefusalCode, detail: str) -> None:
        super().__init__(detail)
        self.code: RefusalCode = code


@dataclass(frozen=True, slots=True)
class EncodingOptions:
    """What an encoder may be told. Only the tile travels, in the identifier: a decoder needs nothing else."""

    tile: int = DEFAULT_TILE  # elements that share a scale: a power of two from 8 to 65536
    density: float = 0.01  # topk: share of the elements that is kept
    rounding: Literal["nearest", "stochastic"] = "nearest"


class Encoding(ABC):
    """One member of the family with its options. Thread-safe: it holds no state."""

    name: ClassVar[str]
    kind: ClassVar[int]  # what the compiled kernels switch on
    lossless: ClassVar[bool]
    bits: ClassVar[float]  # of a code, scales not counted; what tells an encoding of 2 bits and less
    has_stochastic_rounding: ClassVar[bool] = False
    is_checked_by_decoding: ClassVar[bool] = False  # decoding refuses a bad frame by itself, before anything changes
    is_fused: ClassVar[bool] = True  # whether kernels that switch on `kind` know it; else a frame is decoded first

    def __init__(self, options: EncodingOptions) -> None:
        self.options = options
        self.tile = options.tile

    @property
    def identifier(self) -> str:
        """What travels: "int8/64"; members without scales have no tile: "fp32"."""
        return self.name

    @abstractmethod
    def frame_bytes(self, elements: int) -> int:
        """The most bytes that a frame of so many elements takes; all of them, where frames have one size."""

    @abstractmethod
    def encode(self, values: Float32, frame: Bytes, residual: Float32 | None = None, seed: int = 0) -> int:
        """Encode `values` (n,) + `residual` (n,) into `frame` (frame_bytes(n),) in one pass; the bytes it takes.

        `residual` is changed in place to what the frame does not hold: values + residual - decode(frame).
        `values` is not changed. All three are C-contiguous and may not overlap. Values must be finite.
        `seed` is for stochastic rounding: another one each time, or the roundings repeat.
        """

    @abstractmethod
    def sized(self, frame: Bytes, elements: int) -> Bytes:
        """A read-only view of a frame that has the size it must have, which is all that keeps a decoder in its bounds.

        Raises EncodingError("wrong-size") for another size, TypeError for what is no flat array of bytes.
        """

    def encode_delta(self, weights: Float32, published: Float32, frame: Bytes, scratch: Float32) -> int:
        """Encode weights - published (n,) into `frame` (frame_bytes(n),), and move `published` as the frame does.

        Returns the bytes of the frame. `published` becomes, bit for bit, what `decode_add` of the frame makes of it;
        what the frame does not hold stays in the difference. Weights are not changed, `scratch` (n,) may be. All are
        C-contiguous and may not overlap. Members that can do it in one pass over memory do so.
        """
        delta = np.subtract(weights, published, out=scratch)
        written = self.encode(delta, frame)
        self.decode_add(frame[:written], published)
        return written

    @abstractmethod
    def decode(self, frame: Bytes, out: Float32) -> None:
        """Decode a checked frame into `out` (n,)."""

    @abstractmethod
    def decode_add(self, frame: Bytes, out: Float32) -> None:
        """out (n,) += the values of a checked frame, in one pass: how a delta reaches a replica."""

    @abstractmethod
    def check(self, frame: Bytes, elements: int) -> None:
        """Raise EncodingError unless the frame is well-formed, of the right size, and finite throughout."""


_FAMILY: dict[str, type[Encoding]] = {}


def register(member: type[Encoding]) -> type[Encoding]:
    """Class decorator: make an encoding known by its name."""
    _FAMILY[member.name] = member
    return member


def encoding_names() -> list[str]:
    return sorted(_FAMILY)


def make_encoding(name: str, options: EncodingOptions | None = None) -> Encoding:
    """The encoding of that name and options. Raises EncodingError naming the nearest known one, or the bad option."""
    member, options = _FAMILY.get(name), options or EncodingOptions()
    if member is None:
        near = difflib.get_close_matches(name, _FAMILY, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise EncodingError(
            "unknown-encoding", f"unknown encoding {name!r}{hint} (known: {', '.join(encoding_names())})"
        )
    tile = options.tile
    if not (8 <= tile <= 2**16 and tile & (tile - 1) == 0):
        raise EncodingError("unknown-encoding", f"tile {tile} is not a power of two from 8 to 65536")
    if not 0 < options.density <= 1:
        raise EncodingError("unknown-encoding", f"density {options.density} is not in (0, 1]")
    if options.rounding == "stochastic" and not member.has_stochastic_rounding:
        able = ", ".join(sorted(name for name, one in _FAMILY.items() if one.has_stochastic_rounding)) or "none"
        raise EncodingError(
            "unknown-encoding", f"{name} has no stochastic rounding (those that have: {able}); use rounding nearest"
        )
    return member(options)


def parse_encoding(identifier: str) -> Encoding:
    """The encoding that an identifier such as "int8/64" names, to decode with. Raises EncodingError."""
    name, slash, tile = identifier.partition("/")
    if slash and not tile.isdecimal():
        raise EncodingError("unknown-encoding", f"{identifier!r} is no encoding identifier, such as 'int8/64'")
    encoding = make_encoding(name, EncodingOptions(tile=int(tile)) if slash else None)
    if encoding.identifier != identifier:
        raise EncodingError("unknown-encoding", f"{identifier!r} should be written {encoding.identifier!r}")
    return encoding
