"""`up`, `down` and `logs`: the long-lived cluster of this machine."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from paramserver.cli.errors import FailedError, InputError
from paramserver.cli.job_file import AsJson

if TYPE_CHECKING:
    from deploy.home import Record

DEFAULT_HTTP = "127.0.0.1:8420"
FOLLOW_SECONDS = 0.3
TELL_SECONDS = 5.0  # how long `down` waits for the coordinator to tell everybody
TAIL_BYTES = 64 * 2**10
RECENT_SECONDS = 60.0  # a death that was made good is news for so long
ENGINES = ("local", "compose", "ray")
MOST_SHARDS, MOST_WORKERS = 64, 256  # processes of one machine


def up(
    shards: Annotated[int, typer.Option(min=1, max=MOST_SHARDS, help="Shard processes.")] = 2,
    workers: Annotated[int, typer.Option(min=1, max=MOST_WORKERS, help="Worker processes.")] = 2,
    http: Annotated[str, typer.Option(help="HOST:PORT of the HTTP interface; port 0 takes any.")] = DEFAULT_HTTP,
    runs: Annotated[Path | None, typer.Option(help="Where finished jobs are left (default: runs in the home).")] = None,
    data_root: Annotated[
        list[Path] | None, typer.Option(help="A folder that paths in submitted jobs may point into; repeatable.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Compute threads a worker.")] = 1,
    allow_family: Annotated[
        list[str] | None, typer.Option(help="A model family that jobs may use; repeatable (default: all installed).")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="Folder with the keys of all processes (see keygen); others are refused.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token that changes over HTTP need.")
    ] = None,
    token_for_reading: Annotated[
        bool, typer.Option("--token-for-reading", help="Reading over HTTP needs the token as well.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let everybody who reaches --http submit and cancel jobs.")
    ] = False,
    engine: Annotated[str, typer.Option(help="How processes are started: local.")] = "local",
    as_json: AsJson = False,
) -> None:
    """Start a cluster that stays, and return when it is ready."""
    if engine != "local":
        known = "is not supported yet" if engine in ENGINES else "is not known"
        raise InputError(f"--engine {engine!r} {known}; use 'local'")
    from deploy.detached import bring_up
    from deploy.home import HomeError, default_home
    from deploy.local import EngineError, Topology

    for root in data_root or ():
        if not root.is_dir():
            raise InputError(
                f"--data-root {str(root)!r}: there is no such folder; make it, or name the one with the data"
            )
    _check_token(token_file, token_for_reading)
    if keys is not None:
        _check_keys(
            keys, ["coordinator", *(f"shard-{i}" for i in range(shards)), *(f"worker-{i}" for i in range(workers))]
        )
    home = default_home()
    topology = Topology(
        shards=shards,
        workers=workers,
        http=http,
        runs=runs or home.directory / "runs",
        data_roots=tuple(data_root or ()),
        threads=threads,
        allow_families=tuple(allow_family or ()),
        keys=keys,
        token_file=token_file,
        token_for_reading=token_for_reading,
        insecure=insecure,
    )
    try:
        record = bring_up(home, topology)
    except HomeError as error:
        raise InputError(str(error)) from None
    except EngineError as error:
        raise FailedError(str(error)) from None
    if as_json:
        print(json.dumps({"pid": record.pid, "url": record.url, "control": record.control, "runs": str(topology.runs)}))
        return
    print(f"The cluster is ready: {shards} shards, {workers} workers, {record.url} (pid {record.pid}).")
    print("Train with `paramserver submit JOB.yaml`, watch with `paramserver status`, end with `paramserver down`.")


def _check_token(token_file: Path | None, token_for_reading: bool) -> None:
    """What the coordinator would refuse a moment later, said before anything starts."""
    from paramserver.status.access import AccessError, make_access

    try:
        make_access("", token_file, token_for_reading)
    except AccessError as error:
        raise InputError(str(error)) from None


def _check_keys(folder: Path, names: list[str]) -> None:
    """Every process that is to be started has its keys. Raises InputError."""
    from paramserver.protocol.keys import SECRET, KeysError, load_keys

    missing = [name for name in names if not (folder / f"{name}{SECRET}").exists()]
    if missing:
        raise InputError(
            f"--keys {folder}: there is no secret key of {', '.join(missing)}; make them with "
            f"`paramserver keygen --to {folder} {' '.join(missing)}`"
        )
    try:
        for name in names:
            load_keys(folder, name)
    except KeysError as error:
        raise InputError(str(error)) from None


def down() -> None:
    """Stop the cluster that `up` started, and wait until every process has ended.

    Shards and workers that were started by hand are told to end as well.
    """
    from deploy.detached import take_down
    from deploy.home import default_home
    from deploy.local import EngineError

    home = default_home()
    _tell_members(home.record())
    try:
        record = take_down(home)
    except EngineError as error:
        raise FailedError(str(error)) from None
    print(f"The cluster is down (pid {record.pid}).")


def _tell_members(record: Record | None) -> None:
    """Have the coordinator tell everybody who has joined; the supervisor ends only those that it has started."""
    from deploy.api import Api, ApiError

    if record is None or not record.url:
        return
    try:
        token = Path(record.token_file).read_text(encoding="utf-8").strip() if record.token_file else ""
        with Api(record.url, timeout_seconds=TELL_SECONDS, token=token) as api:
            api.shut_down()
    except (ApiError, OSError) as error:
        print(f"paramserver: processes that were started by hand are not told to end: {error}", file=sys.stderr)


def logs(
    name: Annotated[str | None, typer.Argument(help="A process, for example worker-0 (default: all).")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written, until Ctrl-C.")] = False,
) -> None:
    """Print what the processes of this machine's cluster logged; also those of the last one, after `down`."""
    from deploy.detached import log_files
    from deploy.home import default_home

    home = default_home()
    files = log_files(home)
    if name is not None:
        if name not in files:
            raise InputError(f"no log of {name!r} in {home.logs} (there are: {', '.join(files) or 'none'})")
        files = {name: files[name]}
    if not files:
        raise InputError(f"no logs in {home.logs}; start a cluster with `paramserver up`")
    _print_logs(list(files.values()), follow)


def _print_logs(paths: list[Path], follow: bool) -> None:
    # Every event begins with its time and carries role and name, so several logs are merged by sorting.
    opened = [path.open("rb") for path in paths]
    try:
        events = [event for file in opened for event in _events(_tail(file))]
        while True:
            for event in sorted(events):
                sys.stdout.write(event.decode("utf-8", errors="replace"))
            sys.stdout.flush()
            if not follow:
                return
            time.sleep(FOLLOW_SECONDS)
            events = [event for file in opened for event in _events(_new(file))]
    finally:
        for file in opened:
            file.close()


def _tail(file: BinaryIO) -> list[bytes]:
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - TAIL_BYTES))
    if size > TAIL_BYTES:
        file.readline()  # the rest of a line
    return _new(file)


def _new(file: BinaryIO) -> list[bytes]:
    """Whole lines written since; half of one waits for its end."""
    start = file.tell()
    whole, newline, _ = file.read().rpartition(b"\n")
    file.seek(start + len(whole) + len(newline))
    return (whole + newline).splitlines(keepends=True)


def _events(lines: list[bytes]) -> list[bytes]:
    """Lines that do not begin with a time, a library's or a traceback's, stay with the one before them."""
    events: list[bytes] = []
    for line in lines:
        if events and not line[:1].isdigit():
            events[-1] += line
        else:
            events.append(line)
    return events


def note_deaths(record: Record | None) -> None:
    """Say on standard error which processes of this machine's cluster are missing, or were until a moment ago."""
    last = {death["name"]: death for death in record.deaths} if record else {}
    for name, death in last.items():
        what = f"paramserver: {name} {death['reason']} at {death['at']}"
        if death["outcome"] == "started again":
            if (datetime.now(UTC) - datetime.fromisoformat(death["at"])).total_seconds() < RECENT_SECONDS:
                print(f"{what}, started again", file=sys.stderr)
        elif death["outcome"] == "died":
            print(f"{what} and is about to be started again; see `paramserver logs {name}`", file=sys.stderr)
        else:
            print(f"{what} and is not started again; see `paramserver logs {name}`", file=sys.stderr)


def add_to(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(down)
    app.command()(logs)
