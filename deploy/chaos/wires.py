"""The relay as the harness holds it: a child process that answers every command, or is at fault."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.local import EngineError, last_lines

ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class CutReport:
    """What a cut did while it lasted."""

    closed: int = 0  # connections that it closed
    refused: int = 0  # connections that were tried in vain
    held_bytes: int = 0  # that a silent one keeps back

    @property
    def has_fired(self) -> bool:
        return bool(self.closed or self.refused or self.held_bytes)


class Wires:
    """Use as a context manager, from one thread. Every call raises EngineError where the relay does not answer."""

    def __init__(self, log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "deploy.chaos.relay"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )

    def __enter__(self) -> Wires:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def open(self, route: str) -> int:
        """A new port in front of the route's next target; connections wait there until `aim`."""
        return int(self._call({"open": route})["port"])

    def aim(self, route: str, port: int) -> None:
        self._call({"target": route, "port": port})

    def cut(self, name: str, route: str, pids: Sequence[int], is_silent: bool) -> int:
        """Cut these processes off from a route, until `heal`. Returns how many connections that hit at once."""
        command = {"cut": name, "route": route, "pids": list(pids), "is_silent": is_silent}
        return int(self._call(command)["connections"])

    def look(self, name: str) -> CutReport:
        """What a cut has done so far."""
        return CutReport(**self._call({"look": name}))

    def heal(self, name: str) -> CutReport:
        return CutReport(**self._call({"heal": name}))

    def _call(self, command: dict[str, object]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
            line = self._process.stdout.readline() if ready else b""
        except OSError as error:
            raise EngineError(f"the relay takes no commands any more ({error}):\n{last_lines(self._log)}") from None
        if not line:
            raise EngineError(f"the relay does not answer to {command}; last lines:\n{last_lines(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """The relay ends when its input does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(ANSWER_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
        finally:
            self._process.stdout.close()
