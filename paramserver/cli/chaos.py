"""`chaos`: a real job on a cluster of this machine, tormented by a schedule, and the proof of what became of it."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paramserver.cli.cluster import MOST_SHARDS, MOST_WORKERS
from paramserver.cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, CommandError, FailedError, InputError
from paramserver.cli.job_file import AsJson, show_warnings

if TYPE_CHECKING:
    from deploy.chaos.schedule import Declaration
    from paramserver.job import Job

MOST_MINUTES = 7 * 24 * 60.0
STALLING_SHARE = 5  # one fault in so many stalls a shard


def chaos(
    seed: Annotated[int, typer.Option(min=0, help="Of the schedule: the same seed, the same faults.")] = 0,
    minutes: Annotated[float, typer.Option(min=0.1, max=MOST_MINUTES, help="How long it trains under faults.")] = 10.0,
    shards: Annotated[int, typer.Option(min=1, max=MOST_SHARDS, help="Shard processes.")] = 3,
    workers: Annotated[int, typer.Option(min=1, max=MOST_WORKERS, help="Worker processes.")] = 4,
    faults: Annotated[int, typer.Option(min=1, max=100_000, help="How many.")] = 60,
    stalls: Annotated[
        int | None, typer.Option(min=0, max=100_000, help="Those of them that stall a shard (default: a fifth).")
    ] = None,
    quiet_minutes: Annotated[
        float | None,
        typer.Option(min=0.0, max=MOST_MINUTES, help="Of the run to compare with (default: --minutes; 0: none)."),
    ] = None,
    job_file: Annotated[
        Path | None, typer.Option("--job", metavar="JOB.yaml", help="What to train (default: char-lm, no download).")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Compute threads a worker.")] = 1,
    keep: Annotated[Path | None, typer.Option(help="An empty folder for logs, journals and accounts.")] = None,
    out: Annotated[Path | None, typer.Option(help="A file for the report, in JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Kill, stop and cut off the processes of a cluster that trains, and prove that no update is lost or doubled."""
    from deploy.chaos.campaign import Campaign
    from deploy.chaos.copies import AuditError
    from deploy.chaos.harness import ChaosError
    from deploy.chaos.report import lines
    from deploy.local import EngineError, StoppedEarlyError
    from paramserver.process import install_stop

    _check_folders(keep, out)
    job = _job(job_file, shards, workers)
    own_stalls = faults // STALLING_SHARE if stalls is None else stalls
    declaration = _declare(seed, minutes, shards, workers, faults, own_stalls, job)
    stop = install_stop()
    directory = keep or Path(tempfile.mkdtemp(prefix="paramserver-chaos-"))
    quiet_seconds = 60.0 * (minutes if quiet_minutes is None else quiet_minutes)
    campaign = Campaign(job, declaration, quiet_seconds, directory, threads)
    must_keep = True
    try:
        report = campaign.run(stop, _tell)
        must_keep = bool(report["failures"])
    except StoppedEarlyError:
        must_keep = False
        raise CommandError("stopped before it was over: nothing is proven", EXIT_INTERRUPTED) from None
    except (ChaosError, AuditError, EngineError, OSError) as error:
        raise FailedError(f"{error}\nThe seed was {seed}; everything is kept in {directory}") from None
    finally:
        if keep is None and not must_keep:
            shutil.rmtree(directory, ignore_errors=True)
    print(json.dumps(report, indent=1) if as_json else "\n".join(lines(report)))
    if out is not None:  # last: where it cannot be written all else has been said
        _write(out, report)
    if report["failures"]:
        print(f"paramserver: run it again with --seed {seed}; everything is kept in {directory}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED)


def _write(out: Path, report: dict[str, Any]) -> None:
    try:
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise FailedError(f"--out {str(out)!r}: cannot be written: {error.strerror or error}") from None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check_folders(keep: Path | None, out: Path | None) -> None:
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise InputError(f"--keep {str(keep)!r}: is not an empty folder; name another one")
    if out is not None and not out.resolve().parent.is_dir():
        raise InputError(f"--out {str(out)!r}: there is no folder for it; make it first")
    if out is not None and out.is_dir():
        raise InputError(f"--out {str(out)!r}: is a folder; name a file in it")


def _job(job_file: Path | None, shards: int, workers: int) -> Job:
    """The job that is tormented. Raises InputError."""
    from deploy.chaos.campaign import DEFAULT_JOB, resolve_job
    from paramserver.job import JobError, check_data, load_job

    source = str(job_file or "the default job")
    try:
        body: dict[str, Any] = DEFAULT_JOB if job_file is None else load_job(job_file).model_dump(mode="json")
        if job_file is None and shards == 1:
            body = {**body, "durability": {"log": "journal"}}  # nobody is there for a backup
        job, changed = resolve_job(body, shards, workers)
        check_data(job)
    except JobError as error:
        raise InputError(f"{source}: {error}") from None
    show_warnings([*changed, *job.warnings()], source)
    return job


def _declare(seed: int, minutes: float, shards: int, workers: int, faults: int, stalls: int, job: Job) -> Declaration:
    from deploy.chaos.schedule import Declaration, ScheduleError

    try:
        return Declaration(seed, 60.0 * minutes, shards, workers, faults, stalls, job.durability.backups > 0)
    except ScheduleError as error:
        raise InputError(f"--{error}") from None


def add_to(app: typer.Typer) -> None:
    app.command()(chaos)
