"""The model as this worker holds it: the task's live tensors, seen as the blocks of a layout.

A pulled value is decoded where it is used. On the CPU a block is a numpy view of parameter memory. On another device
frames arrive as bytes, and gradients stay there until the encoder has made frames of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.task import Parameter
from paramserver.encoding import Encoding, on_torch, parse_encoding
from paramserver.process import log
from paramserver.protocol import layout as layouts

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
CodecPath = Literal["auto", "device", "host"]

_encoding = cache(parse_encoding)


class Replica:
    """Live parameters and the edition of each block. Used from one thread, between two computations.

    Args:
        parameters: float32, of any device.
        path: where frames are made and decoded: on the parameter's "device" with torch, on the "host" with compiled
            kernels, or "auto": on the host for parameters on the CPU, else on their device.

    Raises ValueError for a parameter that is not float32, and LayoutError for what no layout can hold.
    """

    def __init__(self, parameters: Sequence[Parameter], path: CodecPath = "auto") -> None:
        for parameter in parameters:
            if parameter.tensor.dtype != torch.float32:
                raise ValueError(
                    f"parameter {parameter.name!r} is {parameter.tensor.dtype}; only float32 parameters are supported"
                )
        self.layout = layouts.cut_layout(
            layouts.Parameter(parameter.name, tuple(parameter.tensor.shape), parameter.group)
            for parameter in parameters
        )
        self.editions = np.full(len(self.layout.blocks), -1, np.int64)  # -1: none is held
        self._tensors = {parameter.name: parameter.tensor.detach() for parameter in parameters}
        self._is_on_device = {
            name: path == "device" or (path == "auto" and tensor.device.type != "cpu")
            for name, tensor in self._tensors.items()
        }
        # Of the blocks that take the device path.
        self.devices: Mapping[int, torch.device] = {
            block.index: self._tensors[block.parameter].device
            for block in self.layout.blocks
            if self._is_on_device[block.parameter]
        }
        # Live views; absent where a tensor takes the device path, is on another device or not contiguous.
        self._views: dict[str, Float32] = {
            name: tensor.view(-1).numpy()
            for name, tensor in self._tensors.items()
            if not self._is_on_device[name] and tensor.device.type == "cpu" and tensor.is_contiguous()
        }
        self._staging = np.empty(max(block.elements for block in self.layout.blocks), np.float32)
        self._barred: dict[str, str | None] = {}  # why an encoding is decoded on the host, by its identifier

    def write(self, block: int, edition: int, encoding: str, frame: Bytes) -> bool:
        """Decode a snapshot into parameter memory. False, and no change, where a newer edition is held.

        Raises EncodingError for a frame that is none of this block; nothing is written then.
        """
        if edition <= self.editions[block]:
            return False
        place = self.layout.blocks[block]
        member: Encoding = _encoding(encoding)
        member.check(frame, place.elements)
        view = self._views.get(place.parameter)
        if view is not None:
            member.decode(frame, view[place.start : place.start + place.elements])
        elif self._decodes_on_device(place, member):
            there = torch.tensor(frame, device=self.devices[block])
            self._write(place, on_torch.decode(member, there, place.elements))
        else:
            staged = self._staging[: place.elements]
            member.decode(frame, staged)
            self._write(place, torch.from_numpy(staged))
        self.editions[block] = edition
        return True

    def apply_deltas(self, block: int, edition: int, encoding: str, frames: Sequence[Bytes]) -> bool:
        """Add the deltas that lead to `edition`, one edition each; those that are held already are left out.

        False, and no change, where they do not begin at what is held: ask again. Raises EncodingError for a frame
        that is none of this block: nothing is written then, or, where only decoding finds it out, those before it are.
        """
        held = int(self.editions[block])
        missing = edition - held
        if held < 0 or missing > len(frames):
            return False
        place = self.layout.blocks[block]
        member: Encoding = _encoding(encoding)
        missed = frames[len(frames) - missing :] if missing > 0 else ()
        if member.is_checked_by_decoding:
            for frame in missed:  # checking them all before would decode them twice
                self._add(place, member, [frame])
                self.editions[block] += 1
            return True
        for frame in frames:
            member.check(frame, place.elements)
        if missed:
            # One after another: a sum of deltas would round differently from the published replica.
            self._add(place, member, missed)
            self.editions[block] = edition
        return True

    def _add(self, place: layouts.Block, member: Encoding, frames: Sequence[Bytes]) -> None:
        """Add the values of checked frames to a block, one frame after another."""
        view = self._views.get(place.parameter)
        if view is not None:
            values = view[place.start : place.start + place.elements]
            for frame in frames:
                member.decode_add(frame, values)
        elif self._decodes_on_device(place, member):
            present = self._part(place)
            for frame in frames:
                on_torch.decode_add_(member, torch.tensor(frame, device=present.device), present)
            if not self._tensors[place.parameter].is_contiguous():  # else `present` is the parameter's own memory
                self._write(place, present)
        else:
            values = self.values(place.index)
            for frame in frames:
                member.decode_add(frame, values)
            self._write(place, torch.from_numpy(values))

    def _decodes_on_device(self, place: layouts.Block, member: Encoding) -> bool:
        """Whether a block's frames of this encoding are decoded on its device; what bars all of them is logged once."""
        if not self._is_on_device[place.parameter]:
            return False
        if member.identifier not in self._barred:
            # A worker hears from the shards alone how values come, so it looks when an encoding is first met.
            reason = self._barred[member.identifier] = why_on_host(member)
            if reason is not None:
                log("pulled-through-host", encoding=member.identifier, device=self.devices[place.index], reason=reason)
        return self._barred[member.identifier] is None

    def forget(self, block: int) -> None:
        """What is held of this block is no edition any more: the next pull brings a snapshot."""
        self.editions[block] = -1

    def _part(self, place: layouts.Block) -> Tensor:
        """A block's values (elements,) on their device: a live view of a contiguous parameter, otherwise a copy."""
        flat = self._tensors[place.parameter].reshape(-1)
        return flat[place.start : place.start + place.elements].contiguous()

    def _write(self, place: layouts.Block, values: Tensor) -> None:
        """Write values (elements,) of any device into parameter memory."""
        tensor = self._tensors[place.parameter]
        flat = tensor.reshape(-1)
        flat[place.start : place.start + place.elements].copy_(values)
        if not tensor.is_contiguous():
            tensor.copy_(flat.view(tensor.shape))  # flat may be a copy: not all strides allow a view

    def values(self, block: int) -> Float32:
        """The present values (elements,) of a block: a view on the CPU, otherwise a copy. Do not change it."""
        place = self.layout.blocks[block]
        view = self._views.get(place.parameter)
        if view is None:
            return self._part(place).cpu().numpy()
        return view[place.start : place.start + place.elements]

    def gradients(self, gradients: Mapping[str, Tensor]) -> BlockGradients:
        """Gradients by parameter name as blocks. Raises ValueError for a name or shape that is not ours."""
        flat: dict[str, Float32] = {}
        tensors: dict[str, Tensor] = {}
        for name, gradient in gradients.items():
            tensor = self._tensors.get(name)
            if tensor is None or tensor.shape != gradient.shape:
                found = "no such parameter" if tensor is None else f"the parameter has shape {tuple(tensor.shape)}"
                raise ValueError(f"gradient {name!r} of shape {tuple(gradient.shape)}: {found}")
            if self._is_on_device[name]:
                tensors[name] = gradient.detach().to(tensor.device, torch.float32).contiguous().view(-1)
            else:
                flat[name] = _on_host(gradient)
        return BlockGradients(self.layout, flat, tensors)


class BlockGradients:
    """Gradients seen as blocks: views where the gradient is contiguous float32 on the device that it is wanted on.

    Args:
        flat: by parameter name, those that are on the host.
        tensors: those of parameters on the device path, flat on the parameter's device.
    """

    def __init__(self, layout: layouts.Layout, flat: dict[str, Float32], tensors: Mapping[str, Tensor]) -> None:
        self._blocks = layout.blocks
        self._flat = flat
        self._tensors = tensors

    def __contains__(self, block: int) -> bool:
        parameter = self._blocks[block].parameter
        return parameter in self._flat or parameter in self._tensors

    def __getitem__(self, block: int) -> Float32:
        """The gradient (elements,) of a block on the host. Do not change it."""
        place = self._blocks[block]
        flat = self._flat.get(place.parameter)
        if flat is None:
            # For an encoding that the device cannot do: copied once, for all blocks of the parameter.
            flat = self._flat[place.parameter] = self._tensors[place.parameter].cpu().numpy()
        return flat[place.start : place.start + place.elements]

    def on_device(self, block: int) -> Tensor:
        """The gradient (elements,) of a block on the device path, on its device. Do not change it."""
        place = self._blocks[block]
        return self._tensors[place.parameter][place.start : place.start + place.elements]


def _on_host(gradient: Tensor) -> Float32:
    """Its elements in C order, flat and read-only: a view where it is contiguous float32 on the CPU."""
    if gradient.requires_grad:
        gradient = gradient.detach()
    if not gradient.is_cpu or gradient.dtype != torch.float32:
        gradient = gradient.to("cpu", torch.float32)
    values: Float32 = gradient.numpy().reshape(-1)
    values.flags.writeable = False  # so that its slices go into kernels as they are
    return values


def why_on_host(encoding: Encoding) -> str | None:
    """Why frames of this encoding are made and decoded on the host alone; None where any device does it."""
    try:
        on_torch.encode(encoding, torch.empty(0, dtype=torch.float32, device="cpu"))
    except ValueError as error:
        return str(error)
    return None
