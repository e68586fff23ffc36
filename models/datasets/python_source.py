"""The source text of the running interpreter's own standard library: real text that needs no download.

The same interpreter release gives the same text on every machine: only relative paths decide what is
read, in which order and into which split. Other releases give other text.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from models.datasets.errors import DataError
from models.datasets.text import HELD_OUT_SHARE, Splits

NAME = "python-source"
DEFAULT_MAX_CHARS = 2_000_000  # of training text
MIN_CHARS = 100_000

# One long file must not be most of a held-out part.
MAX_FILE_CHARS = 32_768

# Tests, what is not the library's own, generated tables, and text that is no program.
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "dist-packages", "encodings", "idle_test", "lib-dynload", "pydoc_data", "site-packages",
        "test", "tests", "turtledemo",
    }
)  # fmt: skip
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")


def library_folder() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def find(folder: Path | None = None) -> None:
    """Raises DataError where the interpreter comes without its source."""
    folder = folder or library_folder()
    if next(_source_files(folder), None) is None:
        raise DataError(_missing(folder, 0))


def read(max_chars: int | None = None, folder: Path | None = None) -> Splits:
    """The library in three parts, split by file: 90/5/5 by a hash of the relative path.

    Files follow one another in the order of that hash, so that a limit takes a fair sample of the
    library and not its first letters. `max_chars` (default DEFAULT_MAX_CHARS) limits the training
    part; the others get a twentieth. Raises DataError where the source is missing.
    """
    folder = folder or library_folder()
    limit = DEFAULT_MAX_CHARS if max_chars is None else max_chars
    wanted = {"train": limit, "valid": limit // HELD_OUT_SHARE, "test": limit // HELD_OUT_SHARE}
    texts: dict[str, list[str]] = {split: [] for split in wanted}
    for rank, relative in sorted((_rank(relative), relative) for relative in _source_files(folder)):
        split = _split_of(rank)
        if wanted[split] <= 0:
            continue
        text = _read_source(folder / relative)[: min(MAX_FILE_CHARS, wanted[split])]
        texts[split].append(text)
        wanted[split] -= len(text)
    splits = Splits(**{split: "".join(parts) for split, parts in texts.items()})
    if len(splits.train) < min(MIN_CHARS, limit) or not splits.valid or not splits.test:
        raise DataError(_missing(folder, len(splits.train)))
    return splits


def _missing(folder: Path, found: int) -> str:
    return (
        f"data set {NAME!r}: the standard library's source in {folder} gives {found} characters, "
        f"at least {MIN_CHARS} are needed; use an interpreter that comes with its .py files, or data name 'text-file'"
    )


def _source_files(folder: Path) -> Iterator[str]:
    """Relative paths of the .py files, with "/" on every system."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(SKIPPED_PREFIXES)]
        for name in files:
            if name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES):
                yield (Path(root) / name).relative_to(folder).as_posix()


def _rank(relative: str) -> bytes:
    return hashlib.sha256(relative.encode()).digest()


def _split_of(rank: bytes) -> str:
    # The last byte, because the first ones decide the order.
    share = rank[-1] % 20
    return "valid" if share == 0 else "test" if share == 1 else "train"


def _read_source(path: Path) -> str:
    try:
        # A few files of the library are Latin-1; what is not ASCII becomes the unknown symbol in any case.
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"data set {NAME!r}: {path} is not readable: {error.strerror}") from None
