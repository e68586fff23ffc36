"""`checkpoint`, and what `run` and `submit` say of the checkpoint that they go on from."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paramserver.cli.connection import Url, connected
from paramserver.cli.errors import FailedError, InputError
from paramserver.cli.job_file import AsJson

if TYPE_CHECKING:
    from deploy.api import Api

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 600.0  # for all bytes to be stored and durable

JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.", show_default=False)]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint of the newest run of the job's name.")
]
From = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="RUN[/N]", help="Go on from this checkpoint in the folder of runs.", show_default=False
    ),
]


def resume_place(resume: bool, source: str | None) -> str | None:
    """What the coordinator is asked to go on from: None for nothing, "" for the newest. Raises InputError."""
    if source is not None and not source.strip():
        raise InputError("--from is empty: name RUN or RUN/N, for example char-lm/3, or give --resume for the newest")
    return ("" if resume else None) if source is None else source


def checkpoint(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Take a checkpoint of a job that trains; wait until it is stored."""
    with connected(url) as api:
        number = api.checkpoint(job)
        figures = _await(api, job, number)
    if as_json:
        print(json.dumps({"job": job, "checkpoint": number, "pause_seconds": figures["pause_seconds"]}))
        return
    print(f"{job}/{number}", flush=True)
    print(f"training stood still for {figures['pause_seconds']:.2f} s", file=sys.stderr)


def _await(api: Api, job: str, number: int) -> dict[str, Any]:
    """The figures of a checkpoint that is stored. Raises FailedError."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        current = api.status()["job"]
        if current is None or current["id"] != job:
            raise FailedError(f"{job}: the job ended before checkpoint {number} was stored")
        figures: dict[str, Any] = current["checkpoint"]
        if number in figures["taken"]:
            return figures
        if f"checkpoint {number} was given up" in figures["reason"]:
            raise FailedError(f"{job}: {figures['reason']}; try again")
        if current["state"] in ("done", "failed", "cancelled"):
            raise FailedError(f"{job} is {current['state']}, and checkpoint {number} was not stored before")
        time.sleep(POLL_SECONDS)
    raise FailedError(f"{job}: checkpoint {number} was not stored within {PATIENCE_SECONDS:.0f} s; see `status {job}`")


def add_to(app: typer.Typer) -> None:
    app.command()(checkpoint)
