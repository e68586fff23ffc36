"""How `paramserver up` and `down` start and stop the supervisor of a long-lived cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from deploy.home import Home, Record
from deploy.local import EngineError, Topology, last_lines

DOWN_SECONDS = 40.0  # three waves of notice, and some
POLL_SECONDS = 0.1


def check_port(http: str) -> None:
    """Raise EngineError where HOST:PORT is no address or cannot be bound. Port 0 is any free one."""
    host, colon, port = http.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise EngineError(f"--http {http!r} is no HOST:PORT, for example 127.0.0.1:8420")
    try:
        family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
    except OSError as error:
        raise EngineError(
            f"{http} cannot be listened on: {error.strerror or error}; choose another with --http HOST:PORT "
            "(port 0 takes any free one)"
        ) from None


def bring_up(home: Home, topology: Topology) -> Record:
    """Start a detached supervisor and wait until its cluster is ready.

    Raises HomeError (a cluster runs already) and EngineError. An interrupt takes the supervisor down again.
    """
    lock = home.acquire()
    try:
        check_port(topology.http)
        process, report = _spawn(home, topology, lock)
    finally:
        os.close(lock)  # the supervisor has its own copy
    try:
        with os.fdopen(report, "rb") as pipe:
            line = pipe.readline()
    except BaseException:
        process.terminate()
        process.wait(DOWN_SECONDS)
        raise
    answer = (
        json.loads(line) if line else {"error": f"the supervisor died:\n{last_lines(home.logs / 'supervisor.log')}"}
    )
    if "error" in answer:
        process.wait(DOWN_SECONDS)
        raise EngineError(answer["error"])
    record = home.record()
    if record is None:
        raise EngineError(f"the supervisor ended right after its start:\n{last_lines(home.logs / 'supervisor.log')}")
    return record


def _spawn(home: Home, topology: Topology, lock: int) -> tuple[subprocess.Popen[bytes], int]:
    reader, writer = os.pipe()
    arguments = ["--home", str(home.directory), "--runs", str(topology.runs.resolve()), "--http", topology.http]
    arguments += ["--shards", str(topology.shards), "--workers", str(topology.workers)]
    arguments += ["--threads", str(topology.threads), "--lock-fd", str(lock), "--report-fd", str(writer)]
    for root in topology.data_roots:
        arguments += ["--data-root", str(root.resolve())]
    arguments += topology.door_arguments()
    try:
        with (home.logs / "supervisor.log").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "deploy.supervisor", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(lock, writer),
                start_new_session=True,
            )
    except OSError:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return process, reader


def take_down(home: Home, timeout_seconds: float = DOWN_SECONDS) -> Record:
    """Stop the running cluster and wait until its supervisor is gone. Raises EngineError where none runs."""
    _await(lambda: not home.is_held() or home.record() is not None, 2.0)  # it may be just starting
    record = home.record()
    if record is None:
        raise EngineError(f"no cluster runs on this machine (looked in {home.directory})")
    # The lock is held, so the process that wrote the record lives: the pid cannot be another's.
    _signal(record.pid, signal.SIGTERM)
    if not _await(lambda: not home.is_held(), timeout_seconds):
        # Its children see the end of their lifeline.
        _signal(record.pid, signal.SIGKILL)
        if not _await(lambda: not home.is_held(), timeout_seconds):
            raise EngineError(f"the supervisor (pid {record.pid}) does not end; see {home.logs / 'supervisor.log'}")
    home.record_path.unlink(missing_ok=True)
    return record


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # gone by itself in the meantime


def _await(is_so: Callable[[], bool], timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def log_files(home: Home) -> dict[str, Path]:
    """The logs of the cluster by process name."""
    return {path.stem: path for path in sorted(home.logs.glob("*.log"))}
