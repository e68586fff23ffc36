"""`python -m paramserver.shard`: one shard process."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from paramserver.process import identify, install_stop, log
from paramserver.protocol.keys import KeysError, load_keys
from paramserver.protocol.membership import MembershipError
from paramserver.protocol.messages import Register
from paramserver.protocol.transport import TransportError
from paramserver.protocol.zeromq import ZeroMQTransport
from paramserver.shard.journal.home import JournalHome
from paramserver.shard.journal.layout import JournalError
from paramserver.shard.server import ShardServer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m paramserver.shard", description="One shard of the model.")
    parser.add_argument("--coordinator", required=True, help="its control address, tcp://HOST:PORT")
    parser.add_argument("--name", required=True, help="unique in the cluster, for example shard-0")
    parser.add_argument("--listen", default="tcp://127.0.0.1:0", help="where to bind (default: loopback, a free port)")
    parser.add_argument("--advertise", default="", help="what workers are told, where it differs from --listen")
    parser.add_argument("--keys", type=Path, help="folder with NAME.key_secret and NAME.key of all who may join")
    parser.add_argument("--coordinator-key", type=Path, help="its public key (default: coordinator.key in --keys)")
    parser.add_argument("--insecure", action="store_true", help="listen beyond loopback without keys")
    parser.add_argument("--state", type=Path, help="a folder for journals; without it jobs that want one are refused")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    identify("shard", options.name)
    stop = install_stop()
    introduction = Register(
        role="shard", name=options.name, address=options.advertise, pid=os.getpid(), host=socket.gethostname()
    )
    try:
        keys = None if options.keys is None else load_keys(options.keys, options.name, options.coordinator_key)
    except KeysError as error:
        log("refused", level="error", reason=error)
        return 1
    coordinator_key = "" if keys is None else keys.coordinator
    transport = ZeroMQTransport(keys, options.insecure)
    try:
        home = None if options.state is None else JournalHome(options.state, options.name)
        server = ShardServer(
            transport, options.listen, options.coordinator, introduction, home, coordinator_key=coordinator_key
        )
        log("listening", address=server.address, keys=options.keys or "none")
        server.run(stop)
    except (TransportError, MembershipError, JournalError) as error:
        log("refused", level="error", reason=error)
        return 1
    finally:
        transport.close()
    log("stopped", reason=stop.reason or "ordered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
