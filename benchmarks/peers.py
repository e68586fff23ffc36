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
from multiprocessing.queues import Queue

import torch
import torch.distributed as dist
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp

LEARNING_RATE = 1e-3
MOMENTUM = 0.9

_weights: torch.Tensor | None = None
_velocity: torch.Tensor | None = None


def free_port() -> int:
    """A port that was free a moment ago; torch's rendezvous takes no port 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def timed_cycles(cycle: Callable[[], object], seconds: float) -> float:
    """Cycles a second of one worker over about so many seconds, after a warm-up of a fifth of it."""
    warm_until = time.perf_counter() + seconds / 5
    while time.perf_counter() < warm_until:
        cycle()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        cycle()
        count += 1
    return count / (time.perf_counter() - started)


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


def _rpc_process(rank: int, servers: int, workers: int, elements: int, seconds: float, port: int, out: Queue) -> None:  # type: ignore[type-arg]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", TP_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    name = f"server{rank}" if rank < servers else f"worker{rank - servers}"
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=4, init_method=f"tcp://127.0.0.1:{port}")
    rpc.init_rpc(name, rank=rank, world_size=servers + workers, rpc_backend_options=options)
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

        out.put(timed_cycles(cycle, seconds))
    rpc.shutdown()


def rpc_server(elements: int, servers: int, workers: int, seconds: float) -> float:
    """Cycles a second of all workers together."""
    out = mp.get_context("spawn").SimpleQueue()
    mp.spawn(
        _rpc_process,
        args=(servers, workers, elements, seconds, free_port(), out),
        nprocs=servers + workers,
        join=True,
    )
    return sum(out.get() for _ in range(workers))


# ------------------------------------------------------------------------- gloo all-reduce


def _reduce_process(rank: int, ranks: int, elements: int, seconds: float, port: int, out: Queue) -> None:  # type: ignore[type-arg]
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    gradient, weights, velocity = torch.full((elements,), 1e-3), torch.zeros(elements), torch.zeros(elements)

    def cycle() -> None:
        dist.all_reduce(gradient)
        gradient.div_(ranks)
        velocity.mul_(MOMENTUM).add_(gradient)
        weights.add_(velocity, alpha=-LEARNING_RATE)

    # All ranks must make the same number of calls, so the first one's estimate decides for all.
    for _ in range(3):
        cycle()
    started = time.perf_counter()
    for _ in range(5):
        cycle()
    count = torch.tensor([max(5, int(seconds / ((time.perf_counter() - started) / 5)))])
    dist.broadcast(count, 0)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(int(count)):
        cycle()
    out.put(int(count) / (time.perf_counter() - started))
    dist.barrier()
    dist.destroy_process_group()


def all_reduce(elements: int, ranks: int, seconds: float) -> float:
    """Cycles a second of all ranks together (each rank's step counts as one)."""
    out = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_reduce_process, args=(ranks, elements, seconds, free_port(), out), nprocs=ranks, join=True)
    return sum(out.get() for _ in range(ranks))
