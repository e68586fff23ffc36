"""Where published data sets lie: the folder that PARAMSERVER_DATA names. Nothing is ever downloaded or copied."""

from __future__ import annotations

import lzma
import os
from pathlib import Path

from models.datasets.errors import DataError

VARIABLE = "PARAMSERVER_DATA"


def data_folder() -> Path | None:
    """The folder that PARAMSERVER_DATA names; None where it is not set."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


def find_file(data_set: str, relative: str, instead: str = "'python-source', which needs none") -> Path:
    """The path of one file of a data set. Raises DataError that says where it was sought and how to mend it.

    `instead` is the data name that does without files.
    """
    folder = data_folder()
    mend = f"set {VARIABLE} to the folder that holds {relative}, or use data name {instead}"
    if folder is None:
        raise DataError(f"data set {data_set!r}: {VARIABLE} is not set; {mend}")
    path = folder / relative
    if not path.is_file():
        raise DataError(f"data set {data_set!r}: there is no file {path} ({VARIABLE} is {folder}); {mend}")
    return path


def read_text(data_set: str, relative: str) -> str:
    """The text of one xz file, line ends as they are. Raises DataError for what is missing or damaged."""
    path = find_file(data_set, relative)
    try:
        return lzma.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"data set {data_set!r}: {path} is not readable as xz text: {error}; fetch it again") from None
