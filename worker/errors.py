"""The three ways in which a worker's work ends early; each carries one clear line."""

from __future__ import annotations


class WorkerError(Exception):
    """This process cannot go on, for a foreseeable reason: it exits non-zero with this one line."""


class JobFailure(Exception):  # noqa: N818 - what happened to the job, not a fault of the code
    """This job cannot go on, through nobody's crash: the text goes to the coordinator, the worker lives."""


class Abandoned(Exception):  # noqa: N818 - no error: what was waited for is not wanted any more
    """The job was taken away, or the process was asked to stop, while something was waited for."""
