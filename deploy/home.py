"""Where the long-lived cluster of this machine writes what it is: one folder, one lock, one cluster.json.

The lock is held for as long as the supervisor lives, by the kernel; what cluster.json says counts only
while the lock is held, so that a crash leaves nothing that must be cleaned up.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

VARIABLE = "PARAMSERVER_HOME"
DEFAULT = "~/.paramserver"
LOCK_TRIES = 20
LOCK_PAUSE_SECONDS = 0.05
MOST_DEATHS = 200  # that are remembered; older ones are in the supervisor's log


class HomeError(Exception):
    """The folder cannot be used, or another cluster runs in it. The text says which, and what to do."""


class DeathNote(TypedDict):
    """A process of the cluster that ended without being asked to, and what became of it."""

    name: str
    reason: str  # "was killed (SIGKILL)", "ended with exit code 1"
    at: str  # ISO 8601, UTC
    outcome: str  # died (and waits for its start), started again, given up, left


@dataclass(frozen=True)
class Record:
    """cluster.json: who holds the cluster, and where it answers."""

    pid: int  # of the supervisor
    state: str  # starting, ready
    url: str = ""
    control: str = ""
    shards: int = 0
    workers: int = 0
    token_file: str = ""  # of the bearer token, for commands of this machine; empty where there is none
    deaths: list[DeathNote] = field(default_factory=list)  # in their order, the last MOST_DEATHS
    restarts: int = 0  # of all processes, since the cluster was started


class Home:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def record_path(self) -> Path:
        return self.directory / "cluster.json"

    @property
    def lock_path(self) -> Path:
        return self.directory / "lock"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    def acquire(self) -> int:
        """Take the lock: a file descriptor that holds it until it and its copies are closed. Raises HomeError."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise HomeError(
                f"{self.directory} cannot hold a cluster: {error.strerror}; set {VARIABLE} to a folder that can"
            ) from None
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if self.record() is not None:
                    break
                time.sleep(LOCK_PAUSE_SECONDS)  # held by one who only looks, or by one just starting or stopping
            else:
                self.record_path.unlink(missing_ok=True)
                return descriptor
        os.close(descriptor)
        raise HomeError(self._taken())

    def is_held(self) -> bool:
        """Whether a cluster runs here. Takes the lock for a moment where none does."""
        try:
            descriptor = os.open(self.lock_path, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def record(self) -> Record | None:
        """What the running cluster wrote of itself; None where none runs or it has not written yet."""
        if not self.is_held():
            return None
        try:
            return Record(**json.loads(self.record_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, record: Record) -> None:
        """Replace cluster.json in one piece."""
        part = self.record_path.with_suffix(".part")
        part.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
        part.replace(self.record_path)

    def _taken(self) -> str:
        record = self.record()
        who = f"pid {record.pid}, {record.url or record.state}" if record else "it is just starting or stopping"
        return f"a cluster already runs on this machine ({who}); `paramserver down` stops it"


def default_home() -> Home:
    return Home(Path(os.environ.get(VARIABLE) or DEFAULT).expanduser().absolute())
