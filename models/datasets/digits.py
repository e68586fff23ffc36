"""Optical digits: 1,797 images of handwritten digits, 8 x 8 with 17 shades, 10 classes. Needs no download.

scikit-learn brings them along: the test part of the UCI repository's "Optical Recognition of Handwritten
Digits" (Alpaydin & Kaynak, 1998). There is no usual split of it: here the first 80% are for training, the next 10%
for validation, the last 10% for test.
"""

from __future__ import annotations

import importlib.util

import numpy as np

from models.datasets.errors import DataError
from models.datasets.images import ImageSplits, check_images

NAME = "digits"
PACKAGE = "sklearn"
BRIGHTEST = 16
CLASSES = 10


def find() -> None:
    """Raises DataError where scikit-learn is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise DataError(
            f"data set {NAME!r}: it comes with scikit-learn, which is not installed here; "
            "run pip install 'paramserver[digits]', or use data name 'mnist'"
        )


def read() -> ImageSplits:
    """The split by position. Raises DataError where scikit-learn is not installed."""
    find()
    from sklearn.datasets import load_digits  # the one place that needs it, and it takes a second

    loaded = load_digits()
    pixels, labels = loaded.images.astype(np.uint8), loaded.target.astype(np.uint8)
    images = check_images(f"data set {NAME!r}", pixels, labels, BRIGHTEST, CLASSES)
    first, second = len(images) * 80 // 100, len(images) * 90 // 100
    return ImageSplits(images[:first], images[first:second], images[second:], BRIGHTEST, CLASSES)
