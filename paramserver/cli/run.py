"""`run`: one job on an embedded cluster of this machine, from its start to its result table.

Progress and warnings go to standard error, the result to standard output. Whatever ends the command,
every process that it started has ended before it returns.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paramserver.cli.checkpoint import From, Resume, resume_place
from paramserver.cli.cluster import MOST_SHARDS, MOST_WORKERS
from paramserver.cli.errors import EXIT_INTERRUPTED, FailedError, InputError
from paramserver.cli.figures import EXIT_CODES, FINAL_STATES, progress_line, result_rows, write_rows
from paramserver.cli.job_file import AsJson, JobFile, read_job, show_warnings

if TYPE_CHECKING:
    from deploy.api import Api
    from deploy.local import LocalCluster
    from deploy.supervision import Supervision
    from paramserver.job import Job
    from paramserver.process import StopRequest

POLL_SECONDS = 0.5
PLAIN_SECONDS = 5.0  # between progress lines where there is no terminal
CANCEL_SECONDS = 10.0
SILENT_SECONDS = 30.0  # without an answer of a coordinator that lives
EXIT_TERMINATED = 143


def run(
    job_file: JobFile,
    runs: Annotated[Path, typer.Option(help="Where the job's folder is left.")] = Path("runs"),
    threads: Annotated[int, typer.Option(min=1, max=256, help="Compute threads a worker.")] = 1,
    resume: Resume = False,
    source: From = None,
    as_json: AsJson = False,
) -> None:
    """Train a job on this machine with a cluster of its own, and show the result."""
    from paramserver.process import install_stop

    place = resume_place(resume, source)
    job = read_job(job_file)
    _check_size(job, job_file)
    show_warnings(job.warnings(), job_file)
    stop = install_stop()  # not before: reading a file is interrupted by an exception, not by a request
    directory = Path(tempfile.mkdtemp(prefix="paramserver-run-"))
    keep = True
    try:
        result = _train(job, directory, runs, threads, stop, place)
        keep = result["state"] == "failed"
    except FailedError as error:
        raise FailedError(f"{error}\nThe logs are kept in {directory / 'logs'}") from None
    finally:
        if not keep or stop.is_set():
            shutil.rmtree(directory, ignore_errors=True)
    if result["state"] == "failed":
        print(f"paramserver: {result['job']} failed: {result['reason']}", file=sys.stderr)
        print(f"The logs are kept in {directory / 'logs'}", file=sys.stderr)
    _show(result, runs, as_json)
    code = EXIT_CODES[result["state"]]
    if stop.is_set():
        code = EXIT_TERMINATED if stop.reason == "SIGTERM" else EXIT_INTERRUPTED
    raise typer.Exit(code)


def _check_size(job: Job, job_file: Path) -> None:
    """Refuse a cluster of more processes than one machine is asked for, before the first one starts."""
    for field, found, most in (
        ("shards", job.cluster.shards, MOST_SHARDS),
        ("workers", job.cluster.workers, MOST_WORKERS),
    ):
        if found > most:
            raise InputError(
                f"{job_file}: cluster.{field}: found {found}, but `run` starts at most {most} of them on this machine; "
                "lower it, or submit the job to a cluster that has so many"
            )


def _train(
    job: Job, directory: Path, runs: Path, threads: int, stop: StopRequest, resume: str | None = None
) -> dict[str, Any]:
    """The result of the job, or {"state": "cancelled"} where a stop came before there was one."""
    from deploy.api import Api, ApiError
    from deploy.local import EngineError, LocalCluster, StoppedEarlyError, Topology
    from deploy.supervision import Supervision
    from paramserver.cli.replay import take_journals
    from paramserver.status.access import make_token

    # It reads whatever its user can, so that nobody else of this machine may ask it for anything.
    token_file = directory / "token"
    token = make_token(token_file)
    topology = Topology(
        shards=job.cluster.shards,
        workers=job.cluster.workers,
        runs=runs,
        data_roots=(Path("/"),),  # an embedded run reads whatever its user can
        threads=threads,
        token_file=token_file,
        token_for_reading=True,
    )
    progress = Progress()
    try:
        with LocalCluster(directory, topology) as cluster:
            progress.show(f"starting {topology.shards} shards and {topology.workers} workers")
            cluster.start(stop)
            with Api(cluster.url, token=token) as api:
                answer = api.submit(job.json_text(), resume)
                job_id = answer["id"]
                for warning in answer["warnings"]:
                    if warning not in job.warnings():  # shown already
                        progress.note(f"{job_id}: {warning}")
                _follow(cluster, Supervision(cluster), api, job_id, stop, progress)
        if job.durability.keep == "all":
            take_journals(directory / "state" / "shards", runs / job_id)  # closed by now
        progress.close()
        return _result(runs / job_id)
    except StoppedEarlyError:
        return {"job": job.name, "state": "cancelled", "reason": "stopped while the cluster was starting"}
    except (EngineError, ApiError) as error:
        raise FailedError(str(error)) from None
    finally:
        progress.close()


def _follow(
    cluster: LocalCluster, supervision: Supervision, api: Api, job_id: str, stop: StopRequest, progress: Progress
) -> None:
    """Show progress until the job is over; a stop cancels it first. Raises FailedError where it cannot end."""
    from deploy.api import ApiError

    heard = time.monotonic()
    deadline: float | None = None  # for the job to be over once it is cancelled
    while True:
        _keep_alive(cluster, supervision, progress)
        try:
            if stop.is_set() and deadline is None:
                deadline = time.monotonic() + CANCEL_SECONDS
                progress.note(f"{stop.reason}: cancelling {job_id}")
                api.cancel(job_id)
            if api.job(job_id)["state"] in FINAL_STATES:
                return
            figures = api.status()["job"]
            heard = time.monotonic()
            if figures is not None:
                progress.show(progress_line(figures))
        except ApiError as error:
            if error.status == 409:  # it ended while it was being cancelled
                continue
            if error.status or time.monotonic() - heard > SILENT_SECONDS:
                raise FailedError(f"{job_id}: {error}") from None
        if deadline is not None and time.monotonic() > deadline:
            raise FailedError(f"{job_id} was cancelled but did not end within {CANCEL_SECONDS:.0f} s")
        if deadline is None:
            _pause(cluster, supervision, stop, progress)
        else:
            time.sleep(POLL_SECONDS / 5)


def _pause(cluster: LocalCluster, supervision: Supervision, stop: StopRequest, progress: Progress) -> None:
    """POLL_SECONDS without a question to the coordinator, or less where a stop is asked for."""
    from deploy.supervision import LOOK_SECONDS

    until = time.monotonic() + POLL_SECONDS
    while time.monotonic() < until and not stop.wait(LOOK_SECONDS):
        _keep_alive(cluster, supervision, progress)


def _keep_alive(cluster: LocalCluster, supervision: Supervision, progress: Progress) -> None:
    """Start again what died. Raises FailedError where the job cannot end without what stays away."""
    for happening in supervision.look():
        if happening.outcome != "died":  # its next start is told, in a moment
            progress.note(happening.text)
        # A shard's death is the coordinator's to judge: it fails the job with what was lost, or waits for it.
        is_vital = happening.name == "coordinator" or supervision.gone.keys() >= set(cluster.worker_names)
        if happening.outcome in ("given up", "left") and is_vital:
            raise FailedError(happening.text if happening.outcome == "given up" else str(happening.death))


def _result(folder: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FailedError(f"the job is over, but {folder / 'result.json'} is not readable: {error}") from None
    return result


def _show(result: dict[str, Any], runs: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
    elif "seconds" not in result:
        print(f"{result['job']}: {result['state']}, {result['reason']}", file=sys.stderr)
    else:
        write_rows(result_rows(result), str(result["job"]))
        print(f"{runs / str(result['job'])}/ holds the result, the metrics and, if it is done, the model.")


class Progress:
    """One live line where standard error is a terminal; elsewhere a plain line every few seconds."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, markup=False)
        self._status = self._console.status("") if self._console.is_terminal else None
        self._shown_at = float("-inf")
        self._last_word = ""

    def show(self, line: str) -> None:
        if self._status is not None:
            self._status.update(line)
            self._status.start()
            return
        now, word = time.monotonic(), line.split(" ", 1)[0]
        if word != self._last_word or now - self._shown_at >= PLAIN_SECONDS:  # a change of state is news
            self._shown_at, self._last_word = now, word
            print(line, file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """A line that stays."""
        if self._status is not None:
            self._console.print(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()


def add_to(app: typer.Typer) -> None:
    app.command()(run)
