"""Key pairs of processes, in files: who this process is, and who else belongs to the cluster.

A folder of keys holds NAME.key, which everybody may read, for each process that may take part, and
NAME.key_secret for each that runs on this machine. The names are the processes' own. The public keys of the folder
are the *allow-list*: it is read again when the folder changes, so that a key can be added or withdrawn at any time.

The files are certificates as czmq and pyzmq write them; the keys in them are in Z85, 40 characters each.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import zmq
from zmq.utils import z85

from paramserver.process import log
from paramserver.protocol.transport import TransportError

COORDINATOR = "coordinator"  # the name of its key
PUBLIC, SECRET = ".key", ".key_secret"
KEY_CHARACTERS, KEY_BYTES = 40, 32
LOOK_SECONDS = 1.0  # how late a withdrawn key is seen on a connection that is open
MAX_FILE_BYTES = 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ENTRY = re.compile(rb"^\s*(public|secret)-key\s*=\s*\"([^\"\r\n]*)\"\s*$", re.MULTILINE)


class KeysError(TransportError):
    """Keys that cannot be made or used; the text says which file, why and how to mend it."""


@dataclass(frozen=True)
class KeyPair:
    """In Z85."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True)
class Keys:
    """What a process holds: its own pair, whom it lets in, and the coordinator's public key."""

    own: KeyPair
    allowed: Allowlist
    coordinator: str


def load_keys(folder: Path, name: str, coordinator_key: Path | None = None) -> Keys:
    """The keys of the process of this name from its folder. Raises KeysError.

    Args:
        coordinator_key: the file of the coordinator's public key; where it is not given, the folder's.
    """
    if not _NAME.fullmatch(name):
        raise KeysError(f"the name {name!r} can have no key: use letters, digits and any of ._- in it")
    own = read_pair(folder / f"{name}{SECRET}")
    coordinator = read_public(coordinator_key or folder / f"{COORDINATOR}{PUBLIC}")
    if name == COORDINATOR and own.public != coordinator:
        raise KeysError(
            f"{folder / COORDINATOR}{SECRET} and {COORDINATOR}{PUBLIC} are not of one pair, so that nobody would find "
            "this coordinator; put the two files that were made together there"
        )
    return Keys(own, Allowlist(folder, own.public), coordinator)


def make_keys(folder: Path, name: str) -> Path:
    """Make a pair: NAME.key for everybody and NAME.key_secret for its owner alone. Returns the secret's file.

    Never overwrites: raises KeysError where either file is there, or cannot be written.
    """
    check_absent(folder, name)
    public, secret = (key.decode("ascii") for key in zmq.curve_keypair())
    public_path, secret_path = _paths(folder, name)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_fresh(secret_path, 0o600, _certificate(public, secret))
        _write_fresh(public_path, 0o644, _certificate(public))
    except FileExistsError as error:
        raise KeysError(_already_there(Path(error.filename))) from None
    except OSError as error:
        raise KeysError(f"{folder}: keys cannot be written: {error.strerror}; name a folder that can be") from None
    return secret_path


def check_absent(folder: Path, name: str) -> None:
    """Raise KeysError where no pair of this name can be made: it is there already, or the name is none."""
    if not _NAME.fullmatch(name):
        raise KeysError(f"{name!r} is no name for a key: use letters, digits and any of ._-, as in worker-0")
    for path in _paths(folder, name):
        if path.exists():
            raise KeysError(_already_there(path))


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}{PUBLIC}", folder / f"{name}{SECRET}"


def read_public(path: Path) -> str:
    """The public key of a file. Raises KeysError."""
    return _entry(path, _read(path), b"public")


def read_pair(path: Path) -> KeyPair:
    """The pair of a NAME.key_secret that nobody but its owner may read. Raises KeysError."""
    content = _read(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise KeysError(f"{path}: others than its owner may use this secret; mend that with `chmod 600 {path}`")
    pair = KeyPair(_entry(path, content, b"public"), _entry(path, content, b"secret"))
    if zmq.curve_public(pair.secret.encode()) != pair.public.encode():
        raise KeysError(f"{path}: its two keys are not of one pair; make a new one with `paramserver keygen`")
    return pair


class Allowlist:
    """The public keys of a folder, as it is now. May be asked from several threads.

    A file that is no key lets nobody in and is logged; a folder that cannot be read leaves the list as it was. At the
    start both are errors: raises KeysError.
    """

    def __init__(self, folder: Path, own: str) -> None:
        self._folder = folder
        self._own = own  # a process always lets itself in
        self._look_at = 0.0
        self._seen: object = None
        self._listed: frozenset[str] = frozenset()
        try:
            self._seen = self._look()
        except OSError as error:
            raise KeysError(f"{folder}: keys cannot be read: {error.strerror}; name a folder of keys") from None
        self._listed = frozenset({own, *map(read_public, folder.glob(f"*{PUBLIC}"))})

    def lets_in(self, key: str) -> bool:
        """Whether this key may connect, as the folder is at this moment. Never raises."""
        self._refresh()
        return key in self._listed

    def lets_speak(self, key: str) -> bool:
        """Whether this key may go on, as the folder was LOOK_SECONDS ago or later. Never raises."""
        if monotonic() >= self._look_at:
            self._refresh()
        return key in self._listed

    def _refresh(self) -> None:
        self._look_at = monotonic() + LOOK_SECONDS
        try:
            seen = self._look()
            if seen == self._seen:
                return
            paths = sorted(self._folder.glob(f"*{PUBLIC}"))
        except OSError as error:
            if self._seen != error.errno:
                log("keys-not-readable", level="error", folder=self._folder, reason=error.strerror, action="kept as is")
            self._seen = error.errno
            return
        listed = {self._own}
        for path in paths:
            try:
                listed.add(read_public(path))
            except KeysError as error:
                log("key-ignored", level="error", reason=error)
        self._seen = seen
        before, self._listed = self._listed, frozenset(listed)
        log("keys-read", listed=len(listed), added=len(listed - before), withdrawn=len(before - listed))

    def _look(self) -> object:
        """What changes whenever the folder's keys do."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(PUBLIC):
                    try:
                        status = entry.stat()
                    except FileNotFoundError:
                        continue  # withdrawn just now, or a link to nowhere
                    found.append((entry.name, status.st_ino, status.st_size, status.st_mtime_ns))
        return sorted(found)


def _read(path: Path) -> bytes:
    try:
        if path.is_fifo():
            # Whoever opens a pipe waits for its other end, and with it everybody who wants to be let in.
            raise KeysError(f"{path}: not a file but a pipe; remove it, and put a file there")
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES)
    except OSError as error:
        name = path.name.removesuffix(SECRET).removesuffix(PUBLIC)
        raise KeysError(
            f"{path}: cannot be read: {error.strerror}; `paramserver keygen --to {path.parent} {name}` makes a pair, "
            "or copy the one that there is"
        ) from None


def _entry(path: Path, content: bytes, kind: bytes) -> str:
    for found, value in _ENTRY.findall(content):
        if found == kind and _is_key(value):
            return str(value.decode("ascii"))
    raise KeysError(
        f"{path}: holds no {kind.decode()} key of {KEY_CHARACTERS} characters; copy it anew, or make a pair with "
        "`paramserver keygen`"
    )


def _is_key(text: bytes) -> bool:
    try:
        return len(text) == KEY_CHARACTERS and len(z85.decode(text)) == KEY_BYTES
    except (KeyError, struct.error):  # a character, or a number, that Z85 does not have
        return False


def _certificate(public: str, secret: str = "") -> bytes:
    about = "a secret of this process alone" if secret else "public: may be given to everybody"
    lines = [f"#   paramserver key, {about}", "metadata", "curve", f'    public-key = "{public}"']
    lines += [f'    secret-key = "{secret}"'] if secret else []
    return "\n".join([*lines, ""]).encode("ascii")


def _write_fresh(path: Path, mode: int, content: bytes) -> None:
    """Write a file that is not there yet; nobody else can read a secret at any moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _already_there(path: Path) -> str:
    return f"{path} is there already, and keys are never overwritten; remove both files of a key to replace it"
