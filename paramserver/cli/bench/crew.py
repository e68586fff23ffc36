"""The processes of one measurement. Whatever ends it, every one of them has ended before `Crew` is left.

Each child talks with the parent through one pipe: it says what it has, and hears when to go on. So the
parent knows when all are ready, and a child that dies is named at once instead of being waited for.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_SECONDS = 120.0  # a first start imports torch and compiles kernels, beside others that do the same
GRACE_SECONDS = 5.0

QUIET = {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Environment of children whose libraries warn of their own future on every import."""


class MeasurementError(Exception):
    """A measurement that cannot go on: which process, what it was to do, and what became of it."""


@dataclass(frozen=True)
class Failure:
    """A child's last word where it cannot go on."""

    text: str


class Line:
    """A child's end of its pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def say(self, value: object) -> None:
        self._connection.send(value)

    def hear(self) -> Any:
        return self._connection.recv()


class Child:
    """One process, as the parent sees it."""

    def __init__(self, name: str, process: SpawnProcess, connection: Connection) -> None:
        self.name = name
        self.process = process
        self.connection = connection

    def say(self, value: object = None) -> None:
        try:
            self.connection.send(value)
        except OSError:
            raise self.end("it was told to go on") from None

    def take(self) -> Any:
        """What it has said. Raises MeasurementError where that is a Failure, EOFError where it says nothing more."""
        said = self.connection.recv()
        if isinstance(said, Failure):
            raise MeasurementError(f"{self.name} cannot go on: {said.text}")
        return said

    def end(self, when: str) -> MeasurementError:
        """The error that this child's end is."""
        self.process.join(GRACE_SECONDS)
        try:
            while self.connection.poll():
                self.take()
        except (EOFError, OSError):
            pass
        except MeasurementError as error:
            return error
        return MeasurementError(f"{self.name} ended with exit code {self.process.exitcode} when {when}")


class Crew:
    """Starts children and reaps them. A context manager; used from one thread.

    Args:
        environment: variables that the children have beside ours.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._environment = dict(environment or {})
        self.children: list[Child] = []

    def start(self, name: str, target: Callable[..., None], *arguments: object) -> Child:
        """Run target(line, *arguments) in a fresh process. The target must be importable by its name."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_child, args=(theirs, target, arguments), name=name, daemon=True)
        before = {variable: os.environ.get(variable) for variable in self._environment}
        os.environ.update(self._environment)  # a spawned process takes what is here
        try:
            process.start()
        finally:
            for variable, value in before.items():
                if value is None:
                    del os.environ[variable]
                else:
                    os.environ[variable] = value
            theirs.close()
        child = Child(name, process, ours)
        self.children.append(child)
        return child

    def hear(self, children: Iterable[Child], what: str, seconds: float = START_SECONDS) -> list[Any]:
        """What each of these children says next, in their order.

        Raises MeasurementError when one of them ends first, any child of the crew fails, or the time is over.
        """
        wanted = list(children)
        heard: dict[str, Any] = {}
        deadline = time.monotonic() + seconds
        while len(heard) < len(wanted):
            missing = [child for child in wanted if child.name not in heard]
            running = [child for child in self.children if child.process.exitcode is None]
            wait(
                [*(child.connection for child in missing), *(child.process.sentinel for child in running)],
                max(0.0, deadline - time.monotonic()),
            )
            for child in missing:
                try:
                    if child.connection.poll():  # the last words of a child that has ended still count
                        heard[child.name] = child.take()
                except (EOFError, OSError):
                    raise child.end(f"{what} was awaited") from None
            for child in self.children:
                if child.process.exitcode:
                    raise child.end(f"{what} was awaited")
            if len(heard) < len(wanted) and time.monotonic() >= deadline:
                names = ", ".join(child.name for child in wanted if child.name not in heard)
                raise MeasurementError(f"waited {seconds:.0f} s in vain for {names}: {what}")
        return [heard[child.name] for child in wanted]

    def join(self, children: Iterable[Child], seconds: float = START_SECONDS) -> None:
        """Wait until these children have ended by themselves. Raises MeasurementError for an exit code but 0."""
        deadline = time.monotonic() + seconds
        for child in children:
            child.process.join(max(0.0, deadline - time.monotonic()))
            if child.process.exitcode is None:
                raise MeasurementError(f"{child.name} did not end within {seconds:.0f} s")
            if child.process.exitcode:
                raise child.end("it was to end")

    def end(self, children: Sequence[Child]) -> None:
        """Tell these children that it is over, and wait for them."""
        say_all(children)
        self.join(children)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + (GRACE_SECONDS if error is None else 0.0)
        for child in self.children:
            child.process.join(max(0.0, deadline - time.monotonic()))
        for end in (SpawnProcess.terminate, SpawnProcess.kill):
            for child in self.children:
                if child.process.is_alive():
                    end(child.process)
            for child in self.children:
                child.process.join(GRACE_SECONDS)
        for child in self.children:
            child.process.close()


def say_all(children: Iterable[Child], value: object = None) -> None:
    for child in children:
        child.say(value)


def _child(connection: Connection, target: Callable[..., None], arguments: Sequence[object]) -> None:
    # A session of its own, as the local engine's processes have: Ctrl-C reaches the parent alone, which ends us in
    # order, and a scheduler that shares a busy machine out by sessions treats all measured processes alike.
    os.setsid()
    threading.Thread(target=_end_with_parent, name="lifeline", daemon=True).start()
    try:
        target(Line(connection), *arguments)
    except MeasurementError as error:
        connection.send(Failure(str(error)))
        sys.exit(1)
    except Exception as error:
        connection.send(Failure(f"{type(error).__name__}: {error}"))
        raise


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a spawned process
    parent.join()
    os._exit(1)


def cpu_seconds(children: Iterable[Child]) -> float | None:
    """User and system time that these processes have used, all threads; None where the system does not tell."""
    ticks = 0
    for child in children:
        try:
            # The name in the second field may hold blanks; what follows it may not.
            fields = Path(f"/proc/{child.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return None
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
