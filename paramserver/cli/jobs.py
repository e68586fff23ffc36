"""`submit`, `jobs`, `status`, `cancel` and `export`: what one asks a running coordinator."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from paramserver.cli.checkpoint import From, Resume, resume_place
from paramserver.cli.cluster import note_deaths
from paramserver.cli.connection import VARIABLE, Url, connected
from paramserver.cli.errors import FailedError, InputError
from paramserver.cli.figures import event_rows, load_rows, result_rows, session_rows, status_rows, write_rows
from paramserver.cli.job_file import AsJson, JobFile, show_warnings

JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.", show_default=False)]


def submit(
    job_file: JobFile,
    url: Url = None,
    resume: Resume = False,
    source: From = None,
    as_json: AsJson = False,
) -> None:
    """Queue a job; print its id."""
    from paramserver.job import JobError, load_job

    place = resume_place(resume, source)
    try:
        job = load_job(job_file)
    except JobError as error:
        raise InputError(str(error)) from None
    with connected(url) as api:
        # The resolved text: what was checked here is what is trained there. Data is looked for by the coordinator.
        answer = api.submit(job.json_text(), place)
    if as_json:
        print(json.dumps(answer))
        return
    show_warnings(answer["warnings"], job_file)
    print(answer["id"])


def list_jobs(url: Url = None, as_json: AsJson = False) -> None:
    """List all jobs, the newest first."""
    with connected(url) as api:
        found = api.jobs()
        if as_json:
            print(json.dumps(found, indent=1))
            return
        for job in found:
            print(f"{job['id']:<24} {job['state']:<12} {job['waiting'] or job['reason']}".rstrip())


def status(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="A job's id (default: the running one).")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Say what the cluster, or one job, is doing."""
    with connected(url) as api:
        found = api.status()
        current = found["job"]
        if job is not None and (current is None or current["id"] != job):
            found = api.job(job)
            current = None
        if as_json:
            print(json.dumps(current if job is not None and current else found, indent=1))
            return
        _note_local_deaths(url)
        if job is not None and current is None:
            _write_job(found)
        else:
            _write_status(found, current, with_cluster=job is None)


def _write_status(found: dict[str, Any], current: dict[str, Any] | None, with_cluster: bool) -> None:
    if current is None:
        print("No job runs.")
    else:
        write_rows(status_rows(current))
        write_rows(load_rows(current), "load")
        if current["events"]:
            write_rows(event_rows(current), "events")
    if with_cluster:
        write_rows(session_rows(found), "sessions")
        for queued in found["queue"]:
            print(f"queued: {queued['id']} ({queued['waiting']})")


def _write_job(found: dict[str, object]) -> None:
    """A job that does not run: its result where there is one."""
    result = found.get("result")
    if isinstance(result, dict):
        write_rows([("job", str(found["id"])), *result_rows(result)])
        return
    write_rows([(name, str(found[name])) for name in ("id", "state", "waiting", "reason") if found.get(name)])


def _note_local_deaths(url: str | None) -> None:
    if url is None and VARIABLE not in os.environ:
        from deploy.home import default_home

        note_deaths(default_home().record())


def cancel(job: JobId, url: Url = None) -> None:
    """End a job, whether it waits or runs."""
    with connected(url) as api:
        api.cancel(job)
    print(f"{job} is cancelled.")


def export(
    job: JobId,
    to: Annotated[Path, typer.Option("--to", help="Where to write model.safetensors.", show_default=False)],
    url: Url = None,
) -> None:
    """Fetch the trained weights of a job that is done."""
    with connected(url) as api:
        file, part, to = _open_beside(to, job)
        try:
            with file:
                for piece in api.model(job):
                    file.write(piece)
            part.replace(to)
        except OSError as error:
            raise FailedError(f"{to} cannot be written: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)
    print(f"{to}: {to.stat().st_size:,} bytes", file=sys.stderr)


def _open_beside(to: Path, job: str) -> tuple[BinaryIO, Path, Path]:
    """(file, its path, the path that it gets when it is whole). Raises InputError where it cannot be written."""
    try:
        if to.is_dir():
            to = to / f"{job}.safetensors"
        if to.exists() and not to.is_file():
            raise InputError(f"--to {to}: what is there is no file; name a file or a folder")
        part = to.with_name(f"{to.name}.{os.getpid()}.part")
        return part.open("xb"), part, to
    except (OSError, ValueError) as error:  # the latter for a name that is none, such as ""
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--to {to}: cannot be written: {reason}; name a file in a folder that can") from None


def add_to(app: typer.Typer) -> None:
    app.command()(submit)
    app.command("jobs")(list_jobs)
    app.command()(status)
    app.command()(cancel)
    app.command()(export)
