"""Calls of the user's task in the middle of a job: what it refuses fails the job, not this process.

A ValueError of the task, a DataError among them, says what is the user's to mend. Only calls of the task stand
in here: a ValueError of our own is a fault, and ends the process as every other exception does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from models.task import Batch, Task
from paramserver.protocol.messages import Lease
from worker.errors import JobFailure

_END = object()


@contextmanager
def from_task(doing: str) -> Iterator[None]:
    """Turn a ValueError into a JobFailure that says what was being done."""
    try:
        yield
    except ValueError as error:
        raise JobFailure(f"{doing} failed: {error}") from error


def batches(task: Task, lease: Lease, doing: str) -> Iterator[Batch]:
    """The batches of a lease. What the loop around it raises is none of the task's."""
    with from_task(doing):
        remaining = iter(task.batches(lease.split, lease.examples))
    while True:
        with from_task(doing):
            batch = next(remaining, _END)
        if batch is _END:
            return
        yield batch
