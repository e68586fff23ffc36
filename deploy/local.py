"""The local engine: a whole cluster as processes of this machine. Whatever it starts, it reaps.

Every child holds the read end of a pipe whose write end only this process has (paramserver/process.py),
so that even a SIGKILL of this process ends them all. Children live in sessions of their own: Ctrl-C in
a terminal reaches only this process, which then stops them in order. What dies is started again by
supervision.py, where the one who holds the cluster asks for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from deploy.api import Api, ApiError
from paramserver.process import LIFELINE_VARIABLE, StopRequest, log

LOOPBACK = "tcp://127.0.0.1:0"
START_SECONDS = 90.0  # a first start compiles kernels
NOTICE_SECONDS = 8.0  # between SIGTERM and SIGKILL
POLL_SECONDS = 0.1
QUOTED_LINES = 8
READY_FILE = "ready.json"

# Two thread pools in one process ruin each other, and the processes already share the cores.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class EngineError(Exception):
    """The cluster cannot start or go on. The text says which process, why, and how to mend it."""


class StoppedEarlyError(Exception):
    """A stop was asked for while the cluster was starting; everything is reaped."""


@dataclass(frozen=True)
class Topology:
    """What runs, apart from how it is launched."""

    shards: int = 2
    workers: int = 2
    http: str = "127.0.0.1:0"
    runs: Path = Path("runs")
    data_roots: tuple[Path, ...] = ()
    threads: int = 1  # torch threads a worker
    allow_families: tuple[str, ...] = ()  # model families that jobs may use; all where there are none
    keys: Path | None = None  # folder with the keys of all processes; without it loopback is open to this machine
    token_file: Path | None = None  # of the bearer token that changes over HTTP need
    token_for_reading: bool = False
    insecure: bool = False  # let everybody who reaches a socket beyond loopback use it

    def key_arguments(self) -> list[str]:
        return [] if self.keys is None else ["--keys", str(self.keys.resolve())]

    def family_arguments(self) -> list[str]:
        return [argument for name in self.allow_families for argument in ("--allow-family", name)]

    def door_arguments(self) -> list[str]:
        """The options that say who may ask the coordinator for what; `deploy.supervisor` takes the same."""
        arguments = self.key_arguments() + self.family_arguments()
        arguments += [] if self.token_file is None else ["--token-file", str(self.token_file.resolve())]
        arguments += ["--token-for-reading"] if self.token_for_reading else []
        return arguments + (["--insecure"] if self.insecure else [])


@dataclass(frozen=True)
class Death:
    """A child that ended without being asked to."""

    name: str
    exit_code: int  # negative: the signal
    log: Path

    @property
    def reason(self) -> str:
        if self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        try:
            return f"signal {signal.Signals(-self.exit_code).name}"
        except ValueError:
            return f"signal {-self.exit_code}"

    @property
    def is_in_order(self) -> bool:
        """Whether it ended as one does that was asked to: somebody sent it SIGTERM, or an order said so."""
        return self.exit_code == 0

    @property
    def phrase(self) -> str:
        """What happened, as a sentence without its end."""
        if self.is_in_order:
            return f"{self.name} left in good order"
        if self.exit_code < 0:
            return f"{self.name} was killed ({self.reason.removeprefix('signal ')})"
        return f"{self.name} ended with {self.reason}"

    def __str__(self) -> str:
        return f"{self.name} ended with {self.reason}; last lines of {self.log}:\n{last_lines(self.log)}"


def last_lines(path: Path, lines: int = QUOTED_LINES) -> str:
    """The end of a log, indented; a clear word where there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"  (not readable: {error.strerror})"
    found = [line for line in text.splitlines() if line.strip()][-lines:]
    return "\n".join(f"  {line}" for line in found) or "  (it wrote nothing)"


class _Child:
    def __init__(self, name: str, arguments: Sequence[str], process: subprocess.Popen[bytes], log_path: Path) -> None:
        self.name = name
        self.arguments = tuple(arguments)
        self.process = process
        self.log = log_path


class LocalCluster:
    """A coordinator, shards and workers under one directory: logs/NAME.log, state/, ready.json.

    Use as a context manager: leaving it stops and reaps every process. Not for use by several threads.
    """

    def __init__(self, directory: Path, topology: Topology | None = None) -> None:
        self.directory = directory.resolve()
        self.topology = topology or Topology()
        self.url = ""  # of the HTTP interface
        self.control = ""  # what shards and workers connect to
        self.environment: dict[str, str] = {}  # of every process, beside this one's own
        self._children: dict[str, _Child] = {}
        self._lifeline: tuple[int, int] | None = None
        self._stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def shard_names(self) -> tuple[str, ...]:
        return tuple(f"shard-{number}" for number in range(self.topology.shards))

    @property
    def worker_names(self) -> tuple[str, ...]:
        return tuple(f"worker-{number}" for number in range(self.topology.workers))

    def pids(self) -> dict[str, int]:
        """Process ids by name, of those that run."""
        return {name: child.process.pid for name, child in self._children.items() if child.process.poll() is None}

    @property
    def shard_state(self) -> Path:
        """Where shards keep their journals."""
        return self.directory / "state" / "shards"

    def log_path(self, name: str) -> Path:
        return self.directory / "logs" / f"{name}.log"

    # ---------------------------------------------------------------------------------- start

    def start(self, stop: StopRequest | None = None, timeout_seconds: float = START_SECONDS) -> None:
        """Start everything and wait until the coordinator has heard every process.

        Raises EngineError (a process died, or the time is over) and StoppedEarlyError (`stop` was set);
        in both cases everything that was started is reaped.
        """
        stop = stop or StopRequest()
        deadline = time.monotonic() + timeout_seconds
        try:
            for folder in (self.directory / "logs", self.directory / "state", self.topology.runs):
                folder.mkdir(parents=True, exist_ok=True)
            for name in ("coordinator", *self.shard_names, *self.worker_names):
                self.log_path(name).unlink(missing_ok=True)  # an earlier cluster's would be quoted as this one's
            self._lifeline = os.pipe()
            self.start_coordinator(stop, deadline)
            for name in self.shard_names:
                self.start_shard(name)
            for name in self.worker_names:
                self.start_worker(name)
            self._await_sessions({*self.shard_names, *self.worker_names}, stop, deadline)
        except OSError as error:
            self.stop()
            raise EngineError(f"the cluster cannot start in {self.directory}: {error}") from None
        except BaseException:
            self.stop()
            raise

    def start_shard(self, name: str) -> None:
        """Start a shard, or start one again that has died: its journal, if its job has one, is where it was."""
        self._spawn(name, self._shard_arguments(name))

    def start_worker(self, name: str) -> None:
        """Start a worker, or start one again that has died: it joins as a new incarnation."""
        self._spawn(name, self._worker_arguments(name))

    def start_again(self, name: str) -> None:
        """Start a process of this cluster that has ended, and do not wait for it. Raises OSError."""
        if name == "coordinator":
            self._spawn_coordinator()
        elif name in self.shard_names:
            self.start_shard(name)
        else:
            self.start_worker(name)

    def _shard_arguments(self, name: str) -> list[str]:
        state = ["--state", str(self.shard_state)]
        return ["-m", "paramserver.shard", *self._joining(name), "--listen", LOOPBACK, *state]

    def _worker_arguments(self, name: str) -> list[str]:
        threads, families = str(self.topology.threads), self.topology.family_arguments()
        return ["-m", "worker", *self._joining(name), "--threads", threads, *families]

    def _joining(self, name: str) -> list[str]:
        return ["--coordinator", self.control, "--name", name, *self.topology.key_arguments()]

    def start_coordinator(self, stop: StopRequest | None = None, deadline: float | None = None) -> None:
        """Start the coordinator, or start it again on the ports and the state that it had; wait until it listens."""
        deadline = deadline if deadline is not None else time.monotonic() + START_SECONDS
        ready = self._spawn_coordinator()
        self._await(ready.exists, "the coordinator to listen", stop or StopRequest(), deadline)
        addresses: dict[str, Any] = json.loads(ready.read_text(encoding="utf-8"))
        self.control, self.url = addresses["control"], addresses["http"]

    def _spawn_coordinator(self) -> Path:
        """The file that it writes once it listens."""
        ready = self.directory / READY_FILE
        ready.unlink(missing_ok=True)
        arguments = ["-m", "paramserver.coordinator", "--listen", self.control or LOOPBACK]
        arguments += ["--http", self.url.removeprefix("http://") or self.topology.http]
        arguments += ["--runs", str(self.topology.runs.resolve()), "--state", str(self.directory / "state")]
        arguments += ["--ready-file", str(ready)]
        for root in self.topology.data_roots:
            arguments += ["--data-root", str(root.resolve())]
        self._spawn("coordinator", [*arguments, *self.topology.door_arguments()])
        return ready

    def _spawn(self, name: str, arguments: Sequence[str]) -> None:
        assert self._lifeline is not None, "start() opens the lifeline first"
        lifeline = self._lifeline[0]
        environment = {**os.environ, **self.environment, LIFELINE_VARIABLE: str(lifeline)}
        environment.update(dict.fromkeys(THREAD_VARIABLES, str(self.topology.threads)))
        path = self.log_path(name)
        with path.open("ab") as output:
            process = subprocess.Popen(
                # -P: a folder "worker" where the user stands must not hide ours.
                [sys.executable, "-P", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lifeline,),
                start_new_session=True,
            )
        self._children[name] = _Child(name, arguments, process, path)

    def _await(self, is_there: Callable[[], bool], what: str, stop: StopRequest, deadline: float) -> None:
        while not is_there():
            if stop.is_set():
                raise StoppedEarlyError(stop.reason)
            for death in self.deaths():
                raise EngineError(f"while waiting for {what}: {death}")
            if time.monotonic() > deadline:
                raise EngineError(f"waited in vain for {what}; the logs are in {self.directory / 'logs'}")
            stop.wait(POLL_SECONDS)

    def _await_sessions(self, names: set[str], stop: StopRequest, deadline: float) -> None:
        with Api(self.url, timeout_seconds=2.0, token=self.token()) as api:
            missing = set(names)

            def all_heard() -> bool:
                try:
                    missing.intersection_update(names - sessions_of(api.status()))
                except ApiError:
                    return False  # busy starting; the deadline and the coordinator's own death are watched
                return not missing

            try:
                self._await(all_heard, "the processes to join", stop, deadline)
            except EngineError as error:
                if "in vain" not in str(error):
                    raise
                quoted = "\n".join(f"{name}:\n{last_lines(self.log_path(name), 3)}" for name in sorted(missing))
                raise EngineError(f"{error}; not heard of:\n{quoted}") from None

    def token(self) -> str:
        """What the coordinator asks for; empty where it asks for none. Raises OSError."""
        file = self.topology.token_file
        return "" if file is None else file.read_text(encoding="utf-8").strip()  # the coordinator has checked it

    # ------------------------------------------------------------------------------ afterwards

    def deaths(self) -> list[Death]:
        """Children that ended on their own, each reported once and logged."""
        found = []
        for name, child in list(self._children.items()):
            code = child.process.poll()
            if code is not None:
                del self._children[name]
                found.append(Death(name, code, child.log))
                log("child-died", level="error", child=name, exit_code=code, log=child.log)
        return found

    def kill(self, name: str) -> None:
        """SIGKILL one process and reap it: a fault that was asked for, so no death is reported."""
        child = self._children.pop(name)
        child.process.kill()
        child.process.wait()

    def stop(self, notice_seconds: float = NOTICE_SECONDS) -> None:
        """Workers first, so that they can flush; then shards; the coordinator last. Reaps all. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        waves: tuple[Callable[[str], bool], ...] = (
            lambda name: name.startswith("worker"),
            lambda name: name.startswith("shard"),
            lambda name: True,
        )
        try:
            for belongs in waves:
                wave = [child for name, child in self._children.items() if belongs(name)]
                _end(wave, notice_seconds)
                for child in wave:
                    del self._children[child.name]
        finally:
            # Only an interrupted stop leaves some; they get no notice.
            for child in self._children.values():
                child.process.kill()
                child.process.wait()
            self._children.clear()
            if self._lifeline is not None:
                for descriptor in self._lifeline:
                    os.close(descriptor)
                self._lifeline = None


def _end(children: Sequence[_Child], notice_seconds: float) -> None:
    for child in children:
        child.process.terminate()
    deadline = time.monotonic() + notice_seconds
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log("child-killed", level="warning", child=child.name, after_seconds=notice_seconds)
            child.process.kill()
            child.process.wait()


def sessions_of(status: dict[str, Any]) -> set[str]:
    """The names of all processes that the coordinator hears."""
    sessions = status["sessions"]
    return set(sessions) if isinstance(sessions, dict) else {session["name"] for session in sessions}
