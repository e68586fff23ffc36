"""How a cluster does under faults: what its coordinator says, what its workers have got, when it is whole again.

Progress is read from the workers' accounts, which grow with every acknowledged update, whoever is dead or stopped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from deploy.api import Api, ApiError
from deploy.chaos import proc
from deploy.chaos.schedule import Planned
from paramserver.account import ENTRY_BYTES, account_files

STATUS_SECONDS = 0.25  # between two questions to the coordinator
ANSWER_SECONDS = 1.0
HEARD_SECONDS = 2.0  # a session that was heard of since then is there
STEPS_AFTER = 2  # that every worker must have made after a fault
TRAINING = "training"


@dataclass(frozen=True)
class Status:
    """An answer of the coordinator."""

    received_at: float  # monotonic seconds
    body: dict[str, Any]

    @property
    def job(self) -> dict[str, Any]:
        return dict(self.body["job"] or {})

    @property
    def state(self) -> str:
        return str(self.job.get("state", ""))

    @property
    def age_mark(self) -> float:
        """Another one in every snapshot that the coordinator makes of its state."""
        return float(self.body["uptime_seconds"])


class StatusWatch:
    """Asks in a thread of its own, so that a stopped coordinator holds up nobody else. Use as a context manager."""

    def __init__(self, url: str, token: str = "") -> None:
        self._url = url
        self._token = token
        self._latest: Status | None = None
        self._must_end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def __enter__(self) -> StatusWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._must_end.set()
        self._thread.join(2 * ANSWER_SECONDS)

    @property
    def latest(self) -> Status | None:
        return self._latest

    def _run(self) -> None:
        with Api(self._url, timeout_seconds=ANSWER_SECONDS, token=self._token) as api:
            while not self._must_end.wait(STATUS_SECONDS):
                try:
                    self._latest = Status(time.monotonic(), api.status())
                except ApiError:
                    continue  # dead, stopped or busy; the last answer says how old it is


def acknowledged_by_worker(accounts: Path, job: str) -> dict[str, int]:
    """Updates acknowledged so far, over all incarnations of each worker."""
    counts: dict[str, int] = {}
    for (worker, _), path in account_files(accounts, job).items():
        counts[worker] = counts.get(worker, 0) + path.stat().st_size // ENTRY_BYTES
    return counts


@dataclass
class Recovery:
    """One fault from when it fired until everybody works again."""

    planned: Planned
    fired_at: float
    ended_at: float  # when it was healed; for a death when it fired
    counts: Mapping[str, int]  # acknowledged updates by worker, at `ended_at`
    age_mark: float | None  # of the last status before it
    recovered_at: float | None = None
    restarted: list[int] = field(default_factory=list)  # processes that began because of it
    restart_cpu_seconds: float = 0.0

    def look(self, now: float, status: Status | None, counts: Mapping[str, int], blocks: int, pids: Pids) -> bool:
        """Whether it is over: everybody is heard, nothing is waited for, and every worker has made steps since."""
        if status is None or status.received_at < self.ended_at or status.age_mark == self.age_mark:
            return False
        if not (status.state not in ("", TRAINING) or self._is_whole(status, counts, blocks, pids)):
            return False
        self.recovered_at = now
        self.restart_cpu_seconds = sum(map(proc.processor_seconds, self.restarted))
        return True

    def _is_whole(self, status: Status, counts: Mapping[str, int], blocks: int, pids: Pids) -> bool:
        heard = {
            one["name"]: one["pid"] for one in status.body["sessions"] if one["seconds_since_heartbeat"] < HEARD_SECONDS
        }
        members = {name: pid for name, pid in pids.items() if name != "coordinator"}
        workers = [name for name in members if name.startswith("worker")]
        return (
            heard == members
            and not status.job["waiting"]
            and all(counts.get(name, 0) - self.counts.get(name, 0) >= STEPS_AFTER * blocks for name in workers)
        )


Pids = Mapping[str, int]


@dataclass(frozen=True)
class Sample:
    at: float  # monotonic seconds
    acknowledged: int  # updates, of all workers, since the job began
    is_training: bool


@dataclass(frozen=True)
class Throughput:
    """Acknowledged updates a second while the job trained; `outside` is what lies in no recovery's window."""

    seconds: float
    updates: int
    outside_seconds: float = 0.0
    outside_updates: float = 0.0

    @property
    def a_second(self) -> float:
        return self.updates / self.seconds if self.seconds else 0.0

    @property
    def outside_a_second(self) -> float:
        return self.outside_updates / self.outside_seconds if self.outside_seconds else 0.0


def throughput(samples: Sequence[Sample], windows: Sequence[tuple[float, float]]) -> Throughput:
    """Over the samples between the first and the last in which the job trained.

    Args:
        samples: in the order of their times.
        windows: (begin, end) of recoveries; they may overlap.
    """
    training = [place for place, sample in enumerate(samples) if sample.is_training]
    if len(training) < 2:
        return Throughput(0.0, 0)
    own = samples[training[0] : training[-1] + 1]
    outside_seconds = outside_updates = 0.0
    for before, after in pairwise(own):
        # An interval between two samples is a fraction of a second: it is outside as a whole, or not.
        if all(after.at <= begin or before.at >= end for begin, end in windows):
            outside_seconds += after.at - before.at
            outside_updates += after.acknowledged - before.acknowledged
    return Throughput(
        own[-1].at - own[0].at, own[-1].acknowledged - own[0].acknowledged, outside_seconds, outside_updates
    )
