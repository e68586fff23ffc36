"""Penn Treebank in Mikolov's version: 929,589 training words, a vocabulary of 10,000.

Mikolov et al., "Recurrent neural network based language model", Interspeech 2010. One sentence a line,
rare words already `<unk>`. The text is not free to pass on, so it is only ever read from where it lies.
"""

from __future__ import annotations

from models.datasets.folder import find_file, read_text
from models.datasets.text import Splits

NAME = "ptb"
FILES = {split: f"ptb/ptb.{split}.txt.xz" for split in ("train", "valid", "test")}


def find() -> None:
    """Raises DataError where a file is missing."""
    for relative in FILES.values():
        find_file(NAME, relative)


def read() -> Splits:
    """The published split. Raises DataError."""
    return Splits(**{split: read_text(NAME, relative) for split, relative in FILES.items()})
