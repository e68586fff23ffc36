"""Labelled images in three parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.datasets.errors import DataError


@dataclass(frozen=True)
class Images:
    """Images of one size and their classes; nobody may change the arrays."""

    pixels: npt.NDArray[np.uint8]  # (images, height, width)
    labels: npt.NDArray[np.uint8]  # (images,): classes from 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> Images:
        """The images of a slice: views of the same arrays."""
        return Images(self.pixels[part], self.labels[part])


@dataclass(frozen=True)
class ImageSplits:
    """One collection in three parts that share no image."""

    train: Images
    valid: Images
    test: Images
    brightest: int  # the pixel that stands for 1
    classes: int

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        _, height, width = self.train.pixels.shape
        return int(height * width)


def check_images(
    where: str, pixels: npt.NDArray[np.generic], labels: npt.NDArray[np.generic], brightest: int, classes: int
) -> Images:
    """These arrays as images. Raises DataError that begins with `where` for arrays that are none."""
    if pixels.ndim != 3 or not pixels.size or labels.shape != pixels.shape[:1]:
        raise DataError(
            f"{where}: found arrays of the shapes {pixels.shape} and {labels.shape}; "
            "needed are (images, height, width) and (images,), none of them empty"
        )
    for name, array, largest in (("pixels", pixels, brightest), ("labels", labels, classes - 1)):
        if array.dtype != np.uint8 or array.max() > largest:
            raise DataError(
                f"{where}: found {name} of type {array.dtype} up to {array.max()}; needed is uint8 up to {largest}"
            )
    return Images(pixels.astype(np.uint8, copy=False), labels.astype(np.uint8, copy=False))
