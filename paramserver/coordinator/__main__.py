"""`python -m paramserver.coordinator`: the one coordinator process of a cluster."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from paramserver.coordinator.runs import RunFolder
from paramserver.coordinator.server import CoordinatorServer
from paramserver.coordinator.sessions import SESSION_SECONDS
from paramserver.coordinator.store import Store, StoreError
from paramserver.families import FamiliesError, allow_families
from paramserver.process import identify, install_stop, log
from paramserver.protocol.keys import COORDINATOR, KeysError, load_keys
from paramserver.protocol.transport import TransportError
from paramserver.protocol.zeromq import ZeroMQTransport
from paramserver.status.access import AccessError, make_access
from paramserver.status.http import HttpError, HttpServer

SESSION_BOUNDS = 0.5, 3600.0  # less, and a busy machine's pauses end sessions


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m paramserver.coordinator", description="Decides who does what.")
    parser.add_argument("--listen", default="tcp://127.0.0.1:0", help="for shards and workers (default: a free port)")
    parser.add_argument("--http", default="127.0.0.1:0", help="HOST:PORT of the HTTP API (default: a free port)")
    parser.add_argument("--runs", type=Path, required=True, help="folder of what jobs leave behind")
    parser.add_argument("--state", type=Path, required=True, help="folder of the job store")
    parser.add_argument("--ready-file", type=Path, required=True, help="written as JSON once both sockets are bound")
    parser.add_argument(
        "--data-root", type=Path, action="append", default=[], help="folder that a job's paths may be in; repeatable"
    )
    parser.add_argument(
        "--allow-family",
        action="append",
        default=[],
        metavar="NAME",
        help="model family that jobs may use; repeatable (default: all that are installed)",
    )
    parser.add_argument("--keys", type=Path, help="folder with coordinator.key_secret and NAME.key of all who may join")
    parser.add_argument("--token-file", type=Path, help="file with the bearer token that changes over HTTP need")
    parser.add_argument("--token-for-reading", action="store_true", help="reading over HTTP needs the token as well")
    parser.add_argument(
        "--http-name",
        action="append",
        default=[],
        metavar="NAME",
        help="name of this machine in URLs of the HTTP API, beside its host name and addresses; repeatable",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="let everybody who reaches a socket beyond loopback use it"
    )
    parser.add_argument(
        "--session-seconds",
        type=_session_seconds,
        default=SESSION_SECONDS,
        metavar="SECONDS",
        help="how long a process may be silent before it is given up; six heartbeats (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def _session_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    least, most = SESSION_BOUNDS
    if not least <= seconds <= most:
        raise argparse.ArgumentTypeError(f"found {text!r}, allowed are {least:g} to {most:g} seconds")
    return seconds


def main() -> int:
    options = parse()
    identify("coordinator", "coordinator")
    stop = install_stop()
    try:
        allow_families(options.allow_family)
        keys = None if options.keys is None else load_keys(options.keys, COORDINATOR)
        access = make_access(
            options.http, options.token_file, options.token_for_reading, options.http_name, options.insecure
        )
    except (FamiliesError, KeysError, AccessError) as error:
        log("refused", level="error", reason=error)
        return 1
    key = "" if keys is None else keys.own.public
    transport, ringing = ZeroMQTransport(keys, options.insecure), ZeroMQTransport(keys)
    try:
        store = Store(options.state)
        try:
            runs = RunFolder(options.runs)
            server = CoordinatorServer(
                transport,
                ringing,
                options.listen,
                store,
                runs,
                options.data_root,
                key=key,
                session_seconds=options.session_seconds,
            )
            http = HttpServer(server.commands, options.http, access)
            http.start()
            try:
                _write_ready(options.ready_file, server.address, http.address)
                log("listening", control=server.address, http=http.address, keys=options.keys or "none")
                server.run(stop)
            finally:
                http.close()
        finally:
            store.close()
    except (TransportError, StoreError, HttpError, OSError) as error:
        log("refused", level="error", reason=error)
        return 1
    finally:
        ringing.close()
        transport.close()
    log("stopped", reason=stop.reason)
    return 0


def _write_ready(path: Path, control: str, http: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(json.dumps({"pid": os.getpid(), "control": control, "http": http}), encoding="utf-8")
    fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
