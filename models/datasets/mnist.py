"""MNIST: 70,000 images of handwritten digits, 28 x 28, 10 classes.

LeCun, Bottou, Bengio & Haffner, "Gradient-based learning applied to document recognition", Proc. IEEE, 1998.
Of the 60,000 published training images the last 10,000 are held out for validation; the test images are the
published ones.
"""

from __future__ import annotations

import lzma
import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numpy.lib.npyio import NpzFile

from models.datasets.errors import DataError
from models.datasets.folder import find_file
from models.datasets.images import ImageSplits, check_images

NAME = "mnist"
FILE = "mnist/mnist.npz"
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
BRIGHTEST = 255
CLASSES = 10
HELD_OUT = 10_000


def find() -> None:
    """Raises DataError where the file is missing."""
    _find()


def read() -> ImageSplits:
    """The three parts, in the published order. About a second. Raises DataError for a missing or damaged file."""
    path = _find()
    where = f"data set {NAME!r}: {path}"
    arrays = _read_arrays(path, where)
    train, test = (
        check_images(f"{where}, {part}", arrays[f"x_{part}"], arrays[f"y_{part}"], BRIGHTEST, CLASSES)
        for part in ("train", "test")
    )
    if len(train) <= HELD_OUT:
        raise DataError(f"{where}: found {len(train)} training images; more than {HELD_OUT} are needed")
    return ImageSplits(train[:-HELD_OUT], train[-HELD_OUT:], test, BRIGHTEST, CLASSES)


def _find() -> Path:
    return find_file(NAME, FILE, instead="'digits', which comes with scikit-learn")


def _read_arrays(path: Path, where: str) -> dict[str, npt.NDArray[np.generic]]:
    try:
        with path.open("rb") as file:  # numpy leaves a damaged one open
            archive = np.load(file)
            if not isinstance(archive, NpzFile):
                raise ValueError("it is a single array")
            return {name: archive[name] for name in ARRAYS}
    except (OSError, EOFError, ValueError, KeyError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        wanted = ", ".join(ARRAYS)
        raise DataError(f"{where} is not readable as an npz archive of {wanted}: {error}; fetch it again") from None
