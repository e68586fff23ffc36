"""The model as this worker holds it: the task's live tensors, seen as the blocks of a layout.

On the CPU a block is a numpy view of parameter memory, so a pulled value is decoded where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.task import Parameter
from paramserver.encoding import Encoding, parse_encoding
from paramserver.protocol import layout as layouts

Float32 = npt.NDArray[np.float32]

_encoding = cache(parse_encoding)


class Replica:
    """Live parameters and the edition of each block. Used from one thread, between two computations.

    Raises ValueError for a parameter that is not float32, and LayoutError for what no layout can hold.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
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
        # Live views; absent where a tensor is on another device or not contiguous.
        self._views: dict[str, Float32] = {
            name: tensor.view(-1).numpy()
            for name, tensor in self._tensors.items()
            if tensor.device.type == "cpu" and tensor.is_contiguous()
        }
        self._staging = np.empty(max(block.elements for block in self.layout.blocks), np.float32)

    def write(self, block: int, edition: int, encoding: str, frame: npt.NDArray[np.uint8]) -> bool:
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
        else:
            staged = self._staging[: place.elements]
            member.decode(frame, staged)
            self._write_staged(place, staged)
        self.editions[block] = edition
        return True

    def apply_deltas(self, block: int, edition: int, encoding: str, frames: Sequence[npt.NDArray[np.uint8]]) -> bool:
        """Add the deltas that lead to `edition`, one edition each; those that are held already are left out.

        False, and no change, where they do not begin at what is held: ask again. Raises EncodingError for a frame
        that is none of this block; nothing is written then.
        """
        held = int(self.editions[block])
        missing = edition - held
        if held < 0 or missing > len(frames):
            return False
        place = self.layout.blocks[block]
        member: Encoding = _encoding(encoding)
        for frame in frames:
            member.check(frame, place.elements)
        view = self._views.get(place.parameter)
        values = self.values(block) if view is None else view[place.start : place.start + place.elements]
        for frame in frames[len(frames) - missing :] if missing > 0 else ():
            # One after another: a sum of deltas would round differently from the published replica.
            member.decode_add(frame, values)
        if missing > 0:
            if view is None:
                self._write_staged(place, values)
            self.editions[block] = edition
        return True

    def forget(self, block: int) -> None:
        """What is held of this block is no edition any more: the next pull brings a snapshot."""
        self.editions[block] = -1

    def _write_staged(self, place: layouts.Block, staged: Float32) -> None:
        tensor = self._tensors[place.parameter]
        values = torch.from_numpy(staged)
        if tensor.is_contiguous():
            tensor.view(-1)[place.start : place.start + place.elements].copy_(values)
        else:
            flat = tensor.reshape(-1)  # a copy: the strides do not allow a view
            flat[place.start : place.start + place.elements] = values.to(tensor.device)
            tensor.copy_(flat.view(tensor.shape))

    def values(self, block: int) -> Float32:
        """The present values (elements,) of a block: a view on the CPU, otherwise a copy. Do not change it."""
        place = self.layout.blocks[block]
        view = self._views.get(place.parameter)
        if view is None:
            view = self._tensors[place.parameter].reshape(-1).cpu().numpy()
        return view[place.start : place.start + place.elements]

    def gradients(self, gradients: Mapping[str, Tensor]) -> BlockGradients:
        """Gradients by parameter name as blocks. Raises ValueError for a name or shape that is not ours."""
        flat: dict[str, Float32] = {}
        for name, gradient in gradients.items():
            tensor = self._tensors.get(name)
            if tensor is None or tensor.shape != gradient.shape:
                found = "no such parameter" if tensor is None else f"the parameter has shape {tuple(tensor.shape)}"
                raise ValueError(f"gradient {name!r} of shape {tuple(gradient.shape)}: {found}")
            flat[name] = gradient.detach().to("cpu", torch.float32).contiguous().view(-1).numpy()
        return BlockGradients(self.layout, flat)


class BlockGradients:
    """Gradients seen as blocks: views where the gradient is contiguous float32 on the CPU."""

    def __init__(self, layout: layouts.Layout, flat: Mapping[str, Float32]) -> None:
        self._blocks = layout.blocks
        self._flat = flat

    def __contains__(self, block: int) -> bool:
        return self._blocks[block].parameter in self._flat

    def __getitem__(self, block: int) -> Float32:
        """The gradient (elements,) of a block. Do not change it."""
        place = self._blocks[block]
        return self._flat[place.parameter][place.start : place.start + place.elements]
