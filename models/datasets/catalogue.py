"""What data sets there are, whether each is on this machine, and where to put those that are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from models.datasets import digits, mnist, ptb, python_source, shakespeare, text_file
from models.datasets.errors import DataError
from models.datasets.folder import VARIABLE, data_folder


@dataclass(frozen=True)
class DataSet:
    """One line of `paramserver data list`."""

    name: str
    what: str
    where: str  # a path, or what stands for it
    is_here: bool
    how: str  # how to use it, or how to get it here


def catalogue() -> list[DataSet]:
    """Every data set by name. Looks for files and reads none; raises nothing."""
    folder = data_folder()
    root = str(folder) if folder else f"${VARIABLE} (not set)"
    return [
        _listed(
            python_source.NAME,
            "source text of the running interpreter's standard library; needs no download",
            str(python_source.library_folder()),
            python_source.find,
        ),
        _listed(
            ptb.NAME,
            "Penn Treebank (Mikolov): 929,589 training words, vocabulary 10,000",
            f"{root}/{ptb.FILES['train']}",
            ptb.find,
        ),
        _listed(
            shakespeare.NAME,
            "tiny Shakespeare: 1,115,394 characters of 65 kinds",
            f"{root}/{shakespeare.FILE}",
            shakespeare.find,
        ),
        _listed(
            mnist.NAME,
            "MNIST: 70,000 images of handwritten digits, 28 x 28",
            f"{root}/{mnist.FILE}",
            mnist.find,
        ),
        _listed(
            digits.NAME,
            "optical digits: 1,797 images of handwritten digits, 8 x 8; needs no download",
            "the package scikit-learn",
            digits.find,
        ),
        DataSet(
            text_file.NAME,
            "any UTF-8 text of at least 1,000 characters, split 90/5/5",
            "the path that the job names",
            True,
            "data: {name: text-file, path: FILE}",
        ),
    ]


def _listed(name: str, what: str, where: str, find: Callable[[], None]) -> DataSet:
    try:
        find()
    except DataError as error:
        return DataSet(name, what, where, False, str(error))
    return DataSet(name, what, where, True, f"data: {{name: {name}}}")
