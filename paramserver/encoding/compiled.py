"""How kernels are compiled: serial, without the GIL, no fastmath, cached on disk under a hash of their sources.

Numba's own disk cache looks only at the file of the function itself: when a kernel that it calls in
another file changes, it would go on running the old code. So the cache lives in a folder that is named
by a hash of every `kernels.py` and `constants.py` of this package, which the source folder need not be writable for.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import numba
from numba.extending import intrinsic

from paramserver.process import log

KERNEL_FILE = "kernels.py"
CONSTANTS_FILE = "constants.py"  # what kernels and others share: compiled in, so part of the cache's name as well
_PACKAGE = Path(__file__).resolve().parent.parent

_config: Any = numba.config  # numba sets its attributes at run time

# Compiled functions are not typed: each kernel says in its docstring what it takes.
Function = Callable[..., Any]


def kernel(function: Function) -> Function:
    """Decorator of a module-level kernel in a file named kernels.py. Compiled at its first call.

    Each combination of argument types is compiled and cached by itself, so callers hand in one only.
    """
    return _compiled(function, inline=False)


def inlined(function: Function) -> Function:
    """The same for an inner part of kernels: a size that the caller knows is a constant in it."""
    return _compiled(function, inline=True)


def primitive(function: Function) -> Function:
    """Decorator of a function that emits machine instructions for kernels: what numba itself has no word for."""
    return cast(Function, intrinsic(function))


def _compiled(function: Function, inline: bool) -> Function:
    if Path(function.__code__.co_filename).name != KERNEL_FILE:
        raise RuntimeError(
            f"kernel {function.__name__} is in {function.__code__.co_filename}; its code is part of the cache's name "
            f"only in a file named {KERNEL_FILE}"
        )
    folder = cache_folder()
    with _numba_cache(folder):
        # error_model "numpy": a division that may raise is not vectorised.
        decorate = cast(Any, numba.njit)(
            nogil=True,
            # An inner part is compiled into its callers: machine code of its own, in the cache or not, has no use.
            cache=folder is not None and not inline,
            no_cpython_wrapper=inline,
            no_cfunc_wrapper=inline,
            forceinline=inline,
            fastmath=False,
            boundscheck=False,
            error_model="numpy",
        )
        return cast(Function, decorate(function))


@contextmanager
def _numba_cache(folder: Path | None) -> Iterator[None]:
    """Numba looks its folder up when a function is decorated; other users of numba keep theirs."""
    previous = _config.CACHE_DIR
    if folder is not None:
        _config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        _config.CACHE_DIR = previous


def source_hash(package: Path = _PACKAGE) -> str:
    """Sixteen hex digits over the text of all that is compiled in: kernels, their constants, and this file."""
    digest = hashlib.sha256()
    for path in sorted([*package.rglob(KERNEL_FILE), *package.rglob(CONSTANTS_FILE), Path(__file__)]):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


@cache
def cache_folder() -> Path | None:
    """Where compiled kernels are kept: in NUMBA_CACHE_DIR, else the user's cache folder, else the temporary one.

    None, with a warning in the log, where none of them can be used: kernels are then compiled at every start.
    """
    name = f"paramserver-kernels-{source_hash()}"
    for folder in _candidates(name):
        if _usable(folder):
            return folder
    log(
        "kernel-cache-unavailable",
        level="warning",
        hint="no writable folder of our own; set NUMBA_CACHE_DIR to one, or each start compiles for seconds",
    )
    return None


def _candidates(name: str) -> Iterator[Path]:
    if _config.CACHE_DIR:
        yield Path(_config.CACHE_DIR) / name
        return
    for home in (os.environ.get("XDG_CACHE_HOME"), _home_cache()):
        if home and os.path.isabs(home):
            yield Path(home) / name
    # The temporary folder is everybody's: a folder in it counts only when nobody else can write there.
    owned = Path(tempfile.gettempdir()) / f"paramserver-{os.getuid()}"
    if _usable(owned):
        yield owned / name


def _home_cache() -> str | None:
    try:
        return str(Path.home() / ".cache")
    except RuntimeError:  # an account without a home folder, as in some containers
        return None


def _usable(folder: Path) -> bool:
    """Whether the folder, made if need be, is ours alone and writable: what lies in it will be executed."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat(follow_symlinks=False)
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
