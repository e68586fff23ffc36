"""From a data set's name to its images. Torch-free."""

from __future__ import annotations

from models.datasets import digits, mnist
from models.datasets.images import ImageSplits
from models.mlp.arguments import MlpData


def find_data(data: MlpData) -> None:
    """Raises DataError where the images are not on this machine; reads none."""
    match data.name:
        case "mnist":
            mnist.find()
        case "digits":
            digits.find()


def read_images(data: MlpData) -> ImageSplits:
    """The images in three parts. Raises DataError."""
    match data.name:
        case "mnist":
            return mnist.read()
        case "digits":
            return digits.read()
