"""`python -m deploy.supervisor`: holds the processes of a long-lived cluster until it is told to stop.

`paramserver up` starts it detached, hands it the locked lock file and a pipe, and waits on the pipe for
one line of JSON: {"ready": true} or {"error": TEXT}. From then on it watches: a process that dies is
started again (see supervision.py), and both are logged and written into cluster.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from deploy.home import MOST_DEATHS, DeathNote, Home, Record
from deploy.local import EngineError, LocalCluster, StoppedEarlyError, Topology
from deploy.supervision import LOOK_SECONDS, Happening, Supervision
from paramserver.process import StopRequest, identify, install_stop, log


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.supervisor", description="Holds a local cluster.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--http", required=True)
    parser.add_argument("--data-root", type=Path, action="append", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--allow-family", action="append", default=[])
    parser.add_argument("--keys", type=Path)
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--token-for-reading", action="store_true")
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--lock-fd", type=int, required=True, help="open and locked; inherited")
    parser.add_argument("--report-fd", type=int, required=True, help="the pipe that `up` reads; inherited")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    identify("supervisor", "local")
    stop = install_stop()
    # The lock ends with this process, not with a child that outlives it for a moment.
    os.set_inheritable(options.lock_fd, False)
    os.set_inheritable(options.report_fd, False)
    home = Home(options.home)
    record = Record(
        os.getpid(),
        "starting",
        shards=options.shards,
        workers=options.workers,
        token_file=str(options.token_file or ""),
    )
    home.write(record)
    cluster = LocalCluster(
        options.home,
        Topology(
            shards=options.shards,
            workers=options.workers,
            http=options.http,
            runs=options.runs,
            data_roots=tuple(options.data_root),
            threads=options.threads,
            allow_families=tuple(options.allow_family),
            keys=options.keys,
            token_file=options.token_file,
            token_for_reading=options.token_for_reading,
            insecure=options.insecure,
        ),
    )
    try:
        with cluster:
            cluster.start(stop)
            record = replace(record, state="ready", url=cluster.url, control=cluster.control)
            home.write(record)
            log("ready", url=cluster.url, control=cluster.control)
            _report(options.report_fd, {"ready": True})
            _watch(cluster, home, record, stop)
    except EngineError as error:
        log("failed", level="error", reason=error)
        _report(options.report_fd, {"error": str(error)})
        return 1
    except StoppedEarlyError:
        pass
    finally:
        home.record_path.unlink(missing_ok=True)
    log("stopped", reason=stop.reason)
    return 0


def _watch(cluster: LocalCluster, home: Home, record: Record, stop: StopRequest) -> None:
    supervision = Supervision(cluster)
    while not stop.wait(LOOK_SECONDS):
        for happening in supervision.look():
            record = noted(record, happening, datetime.now(UTC))
            _write(home, record)


def _write(home: Home, record: Record) -> None:
    """A full disk costs the note, not the cluster; the next one says it all again."""
    try:
        home.write(record)
    except OSError as error:
        log("record-not-written", level="warning", path=home.record_path, reason=error)


def noted(record: Record, happening: Happening, now: datetime) -> Record:
    """The record after one more happening."""
    deaths = list(record.deaths)
    if happening.outcome == "started again":
        for place in reversed(range(len(deaths))):
            if deaths[place]["name"] == happening.name:
                deaths[place] = {**deaths[place], "outcome": happening.outcome}
                break
        return replace(record, deaths=deaths, restarts=record.restarts + 1)
    reason = happening.death.phrase.removeprefix(f"{happening.name} ")
    at = now.isoformat(timespec="seconds")
    note = DeathNote(name=happening.name, reason=reason, at=at, outcome=happening.outcome)
    return replace(record, deaths=[*deaths, note][-MOST_DEATHS:])


def _report(descriptor: int, content: dict[str, object]) -> None:
    try:
        os.write(descriptor, json.dumps(content).encode() + b"\n")
        os.close(descriptor)
    except OSError:
        log("report-unread", level="warning")  # `up` was interrupted; `down` stops what it left


if __name__ == "__main__":
    sys.exit(main())
