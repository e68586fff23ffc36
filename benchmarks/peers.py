"""The references: what a plain torch user would build instead. Each does the same work as ours, no more.

* torch RPC server: a remote function takes a gradient, applies heavy-ball momentum, returns the weights.
* gloo all-reduce: every rank sums its gradient with the others'; a collective, not a server.

A cycle is: every element of the model pushed, applied and pulled once by one worker. Rates are in
GB/s of float32 parameters pushed + pulled, whatever is on the wire.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.rpc as rpc

from paramserver.cli.bench.crew import QUIET, Crew, Line
from paramserver.cli.bench.exchange import MOMENTUM as SETTINGS
from paramserver.cli.bench.exchange import Rate, Unwatched, Watch, follow_cycles, run_cycles

LEARNING_RATE, MOMENTUM = SETTINGS["lr"], SETTINGS["momentum"]

_weights: torch.Tensor | None = None
_velocity: torch.Tensor | None = None


def free_port() -> int:
    """A port that was free a moment ago; torch's rendezvous takes no port 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ------------------------------------------------------------------------ torch RPC server


def _allocate(elements: int) -> None:
    global _weights, _velocity
    _weights, _velocity = torch.zeros(elements), torch.zeros(elements)


def _exchange(gradient: torch.Tensor) -> torch.Tensor:
    assert _weights is not None
    assert _velocity is not None
    _velocity.mul_(MOMENTUM).add_(gradient)
    _weights.add_(_velocity, alpha=-LEARNING_RATE)
    return _weights


def _rpc_process(line: Line, rank: int, servers: int, workers: int, elements: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", TP_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    name = f"server{rank}" if rank < servers else f"worker{rank - servers}"
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=4, init_method=f"tcp://127.0.0.1:{port}")
    rpc.init_rpc(  # type: ignore[no-untyped-call]
        name, rank=rank, world_size=servers + workers, rpc_backend_options=options
    )
    if rank < servers:
        _allocate(elements // servers)
    else:
        parts = [torch.full((elements // servers,), 1e-3) for _ in range(servers)]
        # A call to every server first: all have allocated when it returns a tensor.
        for server in range(servers):
            rpc.rpc_sync(f"server{server}", _allocate, args=(elements // servers,))

        def cycle() -> None:
            futures = [rpc.rpc_async(f"server{s}", _exchange, args=(parts[s],)) for s in range(servers)]
            for future in futures:
                future.wait()

        follow_cycles(line, cycle)
    rpc.shutdown()


def rpc_server(elements: int, servers: int, workers: int, seconds: float) -> Rate:
    """Cycles a second of all workers together."""
    port = free_port()
    with Crew(QUIET) as crew:
        started = [
            crew.start(f"rank-{rank}", _rpc_process, rank, servers, workers, elements, port)
            for rank in range(servers + workers)
        ]
        rate = run_cycles(crew, started[servers:], seconds)
        crew.join(started)
    return rate


# ------------------------------------------------------------------------- gloo all-reduce


def _reduce_process(line: Line, rank: int, ranks: int, elements: int, port: int) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    gradient, weights, velocity = torch.full((elements,), 1e-3), torch.zeros(elements), torch.zeros(elements)

    def cycle() -> None:
        dist.all_reduce(gradient)
        gradient.div_(ranks)
        velocity.mul_(MOMENTUM).add_(gradient)
        weights.add_(velocity, alpha=-LEARNING_RATE)

    follow_together(line, cycle)
    dist.destroy_process_group()


def all_reduce(elements: int, ranks: int, seconds: float) -> Rate:
    """Cycles a second of all ranks together (each rank's step counts as one)."""
    port = free_port()
    with Crew(QUIET) as crew:
        started = [crew.start(f"rank-{rank}", _reduce_process, rank, ranks, elements, port) for rank in range(ranks)]
        rate = run_cycles(crew, started, seconds)
        crew.join(started)
    return rate


def follow_together(line: Line, cycle: Callable[[], object], watch: Watch | None = None) -> None:
    """`follow_cycles` of ranks that must all make the same number of calls: the first one's estimate decides."""
    watch = watch or Unwatched()
    line.say(None)
    line.hear()
    cycle()
    started = time.perf_counter()
    for _ in range(2):
        cycle()
    one = (time.perf_counter() - started) / 2
    line.say(None)
    count = torch.tensor([max(3, round(line.hear() / one))])
    dist.broadcast(count, 0)
    watch.begin()
    started = time.perf_counter()
    for _ in range(int(count)):
        cycle()
    elapsed = time.perf_counter() - started
    line.say((int(count), elapsed, watch.end()))
    line.hear()
