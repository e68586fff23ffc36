"""What every process of the system does alike: one log line an event, a stop request, a lifeline.

A process stops when it gets SIGTERM or SIGINT, or when the process that started it is gone: it then
reads end-of-file on its lifeline, a pipe whose other end only the parent holds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from datetime import UTC, datetime

LIFELINE_VARIABLE = "PARAMSERVER_LIFELINE"  # the file descriptor of the inherited pipe end
GRACE_SECONDS = 10.0  # after a lost parent, how long an orderly stop may take

_identity: dict[str, str] = {}


def identify(role: str, name: str) -> None:
    """Set the role and name that every later log line carries."""
    _identity.update(role=role, name=name)


def log(event: str, level: str = "info", **fields: object) -> None:
    """Write one event as one line to standard error: time, level, role, name, event, then the fields.

    A line that cannot be written is lost, and its process goes on: where a disk is full, that is what it has to tell.
    """
    stamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    head = {"level": level, **_identity, "event": event, **fields}
    line = " ".join(f"{key}={_value(value)}" for key, value in head.items())
    try:
        sys.stderr.write(f"{stamp} {line}\n")
        sys.stderr.flush()
    except OSError:
        pass


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    # Quoted wherever a reader that splits on blanks would be misled.
    return json.dumps(text) if not text or any(c in text for c in ' "=\n\r\t') else text


class StopRequest:
    """Set once by a signal or a lost parent; loops look at it at least twice a second."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = ""

    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self, reason: str) -> None:
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    def wait(self, timeout_seconds: float) -> bool:
        return self._event.wait(timeout_seconds)


def install_stop() -> StopRequest:
    """Turn SIGTERM, SIGINT and the end of the lifeline into one StopRequest. Call it in the main thread, once."""
    stop = StopRequest()

    def on_signal(number: int, frame: object) -> None:
        stop.set(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    descriptor = os.environ.get(LIFELINE_VARIABLE)
    if descriptor is not None:
        threading.Thread(target=_watch, args=(int(descriptor), stop), name="lifeline", daemon=True).start()
    return stop


def _watch(descriptor: int, stop: StopRequest) -> None:
    while os.read(descriptor, 1):
        pass
    stop.set("the parent process is gone")
    os.kill(os.getpid(), signal.SIGTERM)  # wakes the main thread from whatever it waits for
    time.sleep(GRACE_SECONDS)
    os._exit(1)
