"""Tiny Shakespeare: 1,115,394 characters of 65 kinds (karpathy/char-rnn).

The usual split is 90% for training and the last 10% held out; the held-out part is halved here into
validation and test.
"""

from __future__ import annotations

from models.datasets.folder import find_file, read_text
from models.datasets.text import Splits, split_by_position

NAME = "shakespeare"
FILE = "shakespeare/tinyshakespeare.txt.xz"


def find() -> None:
    """Raises DataError where the file is missing."""
    find_file(NAME, FILE)


def read() -> Splits:
    """The split by position. Raises DataError."""
    return split_by_position(read_text(NAME, FILE))
