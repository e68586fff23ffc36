"""`python -m paramserver.shard`: one shard process."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from paramserver.process import identify, install_stop, log
from paramserver.protocol.membership import MembershipError
from paramserver.protocol.messages import Register
from paramserver.protocol.transport import TransportError
from paramserver.protocol.zeromq import ZeroMQTransport
from paramserver.shard.core import ShardCore
from paramserver.shard.journal.home import JournalHome
from paramserver.shard.journal.layout import JournalError
from paramserver.shard.server import ShardServer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m paramserver.shard", description="One shard of the model.")
    parser.add_argument("--coordinator", required=True, help="its control address, tcp://HOST:PORT")
    parser.add_argument("--name", required=True, help="unique in the cluster, for example shard-0")
    parser.add_argument("--listen", default="tcp://127.0.0.1:0", help="where to bind (default: loopback, a free port)")
    parser.add_argument("--advertise", default="", help="what workers are told, where it differs from --listen")
    parser.add_argument("--state", type=Path, help="a folder for journals; without it jobs that want one are refused")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    identify("shard", options.name)
    stop = install_stop()
    introduction = Register(
        role="shard", name=options.name, address=options.advertise, pid=os.getpid(), host=socket.gethostname()
    )
    transport = ZeroMQTransport()
    try:
        home = None if options.state is None else JournalHome(options.state, options.name)
        core = ShardCore(options.name)
        server = ShardServer(core, transport, options.listen, options.coordinator, introduction, home)
        log("listening", address=server.address)
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
