"""What the HTTP API may ask of the coordinator. It knows nothing else of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Commands(Protocol):
    """Every method may be called from any thread but the coordinator's own, and answers within seconds.

    All raise BusyError where the coordinator does not answer. What is returned is never changed afterwards.
    """

    def submit(self, text: str, resume: str | None = None, key: str = "") -> tuple[str, list[str]]:
        """Queue a job given as YAML or JSON. Returns its id and warnings. Raises JobError.

        `resume`: go on from a checkpoint: "" the newest of the job's name, "RUN" or "RUN/N".
        `key`: the same one again, where an answer was lost, queues nothing and answers the same; empty for none.
        """
        ...

    def checkpoint(self, job_id: str) -> int:
        """Ask for a checkpoint. Returns its number. Raises UnknownJobError, EndedJobError: the job does not train."""
        ...

    def cancel(self, job_id: str) -> None:
        """Raises UnknownJobError, EndedJobError."""
        ...

    def shut_down(self) -> list[str]:
        """Tell all shards and workers to end, as `down` does. Returns their names."""
        ...

    def jobs(self) -> list[dict[str, Any]]: ...

    def job(self, job_id: str) -> dict[str, Any]:
        """Raises UnknownJobError."""
        ...

    def model(self, job_id: str) -> Path:
        """The exported model. Raises UnknownJobError, and EndedJobError for a job that is not done."""
        ...

    def status(self) -> dict[str, Any]: ...
