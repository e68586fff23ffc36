"""Any UTF-8 text by path: 90% for training, 5% for validation, 5% for test, by position."""

from __future__ import annotations

from pathlib import Path

from models.datasets.errors import DataError
from models.datasets.text import Splits, split_by_position

NAME = "text-file"
MIN_CHARS = 1_000  # below this a split has nothing to say


def read(path: str) -> Splits:
    """The text in three parts, line ends as they are. Raises DataError: missing, not UTF-8, too short."""
    file = Path(path)
    try:
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise DataError(f"text file {path!r} is a device or a pipe, which may have no end; name a UTF-8 text file")
        raw = file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"text file {path!r}: there is no such file (sought as {file.absolute()})") from None
    except IsADirectoryError:
        raise DataError(f"text file {path!r} is a folder; name one UTF-8 text file") from None
    except OSError as error:
        raise DataError(f"text file {path!r} is not readable: {error.strerror}") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"text file {path!r} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start} "
            f"({error.reason}); convert it, for example with iconv -t UTF-8"
        ) from None
    if len(text) < MIN_CHARS:
        raise DataError(f"text file {path!r} is too short: {len(text)} characters; at least {MIN_CHARS} are needed")
    return split_by_position(text)
