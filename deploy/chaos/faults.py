"""The faults: how each is done to a real process, how it is ended, and by what it is known to have happened.

A fault that was declared proves nothing; one whose evidence was seen does.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.chaos import proc
from deploy.chaos.cluster import ChaosCluster
from deploy.chaos.schedule import Planned
from deploy.chaos.wires import CutReport
from deploy.local import Death

LOG_ROOM_BYTES = 64 * 2**10  # that a shard with a full disk may still write to its log
REFUSED = "event=journal "  # a line of a shard whose journal cannot be written
ERROR = "level=error"


@dataclass(frozen=True)
class Evidence:
    """What was seen of a fault. `text` says it for people."""

    has_fired: bool
    text: str


class Fault(ABC):
    """One fault on a cluster. `begin`, then `is_proven` until it is, then `end` when its time is over."""

    def __init__(self, planned: Planned, cluster: ChaosCluster) -> None:
        self.planned = planned
        self.cluster = cluster
        self.pid = cluster.pids()[planned.target]

    @abstractmethod
    def begin(self) -> None: ...

    @abstractmethod
    def evidence(self, deaths: Sequence[Death]) -> Evidence:
        """What there is so far. `deaths` are those of all processes since `begin`."""

    @abstractmethod
    def end(self) -> None: ...


class Kill(Fault):
    def begin(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def evidence(self, deaths: Sequence[Death]) -> Evidence:
        found = [death for death in deaths if death.name == self.planned.target]
        has_fired = any(death.exit_code == -signal.SIGKILL for death in found)
        return Evidence(has_fired, f"pid {self.pid}: {found[0].phrase if found else 'has not ended'}")

    def end(self) -> None:
        """The supervision starts it again."""


class Restart(Fault):
    """An orderly end by SIGTERM, and a new process as soon as the old one is gone."""

    def begin(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def evidence(self, deaths: Sequence[Death]) -> Evidence:
        found = [death for death in deaths if death.name == self.planned.target]
        has_fired = any(death.is_in_order for death in found)
        return Evidence(has_fired, f"pid {self.pid}: {found[0].phrase if found else 'has not ended'}")

    def end(self) -> None:
        if self.planned.target not in self.cluster.pids():
            self.cluster.start_again(self.planned.target)


class Stop(Fault):
    """SIGSTOP, and SIGCONT at the end."""

    _was_stopped = False

    def begin(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def evidence(self, deaths: Sequence[Death]) -> Evidence:
        self._was_stopped = self._was_stopped or proc.state(self.pid) == "T"
        return Evidence(self._was_stopped, f"pid {self.pid}: {'was' if self._was_stopped else 'was not'} in state T")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has died in the meantime, which is told elsewhere
            os.kill(self.pid, signal.SIGCONT)


class Cut(Fault):
    """One process cut off from another's address."""

    def begin(self) -> None:
        planned = self.planned
        self._name = f"cut {planned.number}"
        self._healed: CutReport | None = None
        self._hit = self.cluster.wires.cut(self._name, planned.other, [self.pid], planned.is_silent)

    def evidence(self, deaths: Sequence[Death]) -> Evidence:
        report = self._healed or self.cluster.wires.look(self._name)
        text = (
            f"{self._hit} connections hit: {report.closed} closed, {report.refused} tried in vain, "
            f"{report.held_bytes} bytes kept back"
        )
        # A connection that was held for all of its time was cut, also where nobody had anything to say.
        return Evidence(report.has_fired or (self._healed is not None and self._hit > 0), text)

    def end(self) -> None:
        self._healed = self.cluster.wires.heal(self._name)


class FullDisk(Fault):
    """No file of the shard may grow: the kernel refuses its next write (EFBIG), as a full disk does with ENOSPC.

    A limit on the size of files (RLIMIT_FSIZE) is set from outside; it needs no rights, and nothing is left behind.
    """

    def begin(self) -> None:
        self._log = self.cluster.log_path(self.planned.target)
        self._seen = self._log.stat().st_size
        self._before = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        # A journal is refused where it is now, or as soon as it is as long as the log may still become.
        limit = max(self._seen + LOG_ROOM_BYTES, min(self._present_sizes(), default=0))
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (limit, self._before[1]))

    def _present_sizes(self) -> list[int]:
        """Of the segments that are written to: the last one of each journal."""
        last: dict[Path, Path] = {}
        for path in sorted((self.cluster.shard_state / self.planned.target).rglob("segment-*.log")):
            last[path.parent] = path
        return [path.stat().st_size for path in last.values()]

    def evidence(self, deaths: Sequence[Death]) -> Evidence:
        with self._log.open("rb") as file:
            file.seek(self._seen)
            lines = file.read().decode(errors="replace").splitlines()
        refused = [line for line in lines if REFUSED in line and ERROR in line]
        return Evidence(bool(refused), refused[0].partition("state=")[2] if refused else "no write was refused")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # as above
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, self._before)


def make_fault(planned: Planned, cluster: ChaosCluster) -> Fault:
    """Raises KeyError where the target does not run."""
    verb = planned.kind.partition("-")[0]
    kinds: dict[str, type[Fault]] = {"kill": Kill, "restart": Restart, "stop": Stop, "cut": Cut, "full": FullDisk}
    return kinds[verb](planned, cluster)
