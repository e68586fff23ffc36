"""`python -m worker`: one worker process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from paramserver.families import FamiliesError, allow_families
from paramserver.process import identify, install_stop, log
from paramserver.protocol.keys import KeysError, load_keys
from paramserver.protocol.transport import TransportError
from paramserver.protocol.zeromq import ZeroMQTransport
from worker.control import ControlThread
from worker.desk import Desk
from worker.device import keep_freed_memory, limit_threads
from worker.errors import WorkerError
from worker.runner import Runner


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker", description="One worker: computes, pushes, pulls.")
    parser.add_argument("--coordinator", required=True, help="its control address, tcp://HOST:PORT")
    parser.add_argument("--name", required=True, help="unique in the cluster, for example worker-0")
    parser.add_argument("--threads", type=_positive, default=1, help="compute threads of this process (default: 1)")
    parser.add_argument(
        "--allow-family",
        action="append",
        default=[],
        metavar="NAME",
        help="model family that jobs may use; repeatable (default: all that are installed)",
    )
    parser.add_argument(
        "--accounts", type=Path, metavar="FOLDER", help="note there what was acknowledged, for a proof after a death"
    )
    parser.add_argument("--keys", type=Path, help="folder with NAME.key_secret and coordinator.key")
    parser.add_argument("--coordinator-key", type=Path, help="its public key (default: coordinator.key in --keys)")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; a whole number from 1 up is allowed")
    return int(text)


def main() -> int:
    options = parse()
    identify("worker", options.name)
    stop = install_stop()
    limit_threads(options.threads)
    keep_freed_memory()
    try:
        allow_families(options.allow_family)
        keys = None if options.keys is None else load_keys(options.keys, options.name, options.coordinator_key)
    except (FamiliesError, KeysError) as error:
        log("refused", level="error", reason=error)
        return 1
    desk = Desk()
    transport = ZeroMQTransport(keys)
    control = ControlThread(
        lambda: ZeroMQTransport(keys), options.coordinator, options.name, desk, "" if keys is None else keys.coordinator
    )
    control.start()
    log("started", coordinator=options.coordinator, threads=options.threads)
    try:
        Runner(transport, options.name, desk, stop, options.accounts).run()
    except (WorkerError, TransportError) as error:
        log("refused", level="error", reason=error)
        return 1
    finally:
        control.close()
        transport.close()
    log("stopped", reason=stop.reason or "ordered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
