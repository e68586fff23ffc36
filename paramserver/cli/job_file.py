"""`validate` and `schema`: what can be said of a job without a cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paramserver.cli.errors import InputError

if TYPE_CHECKING:
    from paramserver.job import Job

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job specification.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def read_job(path: Path) -> Job:
    """The checked job, its data found on this machine, its warnings printed. Raises InputError."""
    from paramserver.job import JobError, check_data, load_job

    try:
        job = load_job(path)
    except JobError as error:
        raise InputError(str(error)) from None
    try:
        check_data(job)
    except JobError as error:
        raise InputError(f"{path}: {error}") from None
    return job


def show_warnings(warnings: list[str], source: object) -> None:
    for warning in warnings:
        print(f"paramserver: warning: {source}: {warning}", file=sys.stderr)


def validate(job_file: JobFile, as_json: AsJson = False) -> None:
    """Check a job file and the presence of its data; print what it resolves to."""
    job = read_job(job_file)
    if as_json:
        print(json.dumps({"job": job.model_dump(mode="json"), "warnings": job.warnings()}, indent=1))
        return
    show_warnings(job.warnings(), job_file)
    for field, value in job.model_dump(mode="json").items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {_short(inner)}" for name, inner in value.items() if inner is not None)
        print(f"{field:<12} {value}")
    print(f"{job_file} is a valid job, and its data is here.")


def _short(value: object) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{name} {_short(inner)}" for name, inner in value.items() if inner is not None)
        return f"({inside})"
    return str(value).lower() if isinstance(value, bool) else str(value)


def schema() -> None:
    """Print the JSON Schema of a job, with what each installed model family takes."""
    from paramserver.job import job_schema

    print(json.dumps(job_schema(), indent=1))


def add_to(app: typer.Typer) -> None:
    app.command()(validate)
    app.command()(schema)
