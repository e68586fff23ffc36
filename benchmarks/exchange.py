"""Exchange rate (push + apply + pull) by model size, against what a torch user would build instead.

Real shard and worker processes of this project, the shards' own loop, synthetic gradients. Launches of
ours and of the peers alternate, so that a drift of the machine's speed meets all of them alike.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.queues import SimpleQueue
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.report import median, show, spread

OURS = ("fp32 / fp32", "int8 / bf16", "fp32 / fp32, sockets only")
RPC, GLOO = "torch RPC server", "gloo all-reduce"
DEAD_COORDINATOR = "tcp://127.0.0.1:9"  # nobody answers there: the order is handed over directly


def _layout(elements: int, shards: int) -> Any:
    """One equal part a shard, as the peers have it."""
    from paramserver.protocol.layout import Parameter, cut_layout

    return cut_layout([Parameter(f"part{shard}", (elements // shards,), "all") for shard in range(shards)])


def _specification(push: str, pull: str, optimizer: str) -> str:
    return json.dumps(
        {
            "name": "exchange",
            "model": {"family": "recurrent"},
            "push": {"encoding": push},
            "pull": {"encoding": pull},
            "optimizer": {"name": optimizer, "lr": peers.LEARNING_RATE, "momentum": peers.MOMENTUM},
        }
    )


def _shard_process(
    number: int, shards: int, elements: int, specification: str, ready: SimpleQueue[Any], done: SimpleQueue[Any]
) -> None:
    import os
    import resource
    from threading import Thread

    from paramserver.encoding import make_encoding
    from paramserver.job import Job
    from paramserver.process import StopRequest
    from paramserver.protocol.messages import Register, ShardOrder
    from paramserver.protocol.zeromq import ZeroMQTransport
    from paramserver.shard.core import ShardCore
    from paramserver.shard.optimizers import make_optimizer, warm_up
    from paramserver.shard.server import ShardServer

    # The compiled kernels count as imports: they are loaded from their disk cache.
    job = Job.model_validate_json(specification)
    encodings = [make_encoding("fp32"), make_encoding(job.push.encoding), make_encoding(job.pull.encoding)]
    warm_up(make_optimizer(job.optimizer), encodings)
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layout = _layout(elements, shards)
    blocks = tuple(block.index for block in layout.blocks if block.parameter == f"part{number}")
    core = ShardCore(f"shard-{number}")
    order = ShardOrder(job="exchange", specification=specification, term=1, phase=0, layout=layout, blocks=blocks)
    core.take_order(order)
    stop = StopRequest()
    introduction = Register(role="shard", name=core.name, pid=os.getpid())
    server = ShardServer(core, ZeroMQTransport(), "tcp://127.0.0.1:0", DEAD_COORDINATOR, introduction)
    ready.put((number, core.name, server.address, blocks))

    def wait_for_end() -> None:
        done.get()
        stop.set("the benchmark is over")

    Thread(target=wait_for_end, daemon=True).start()
    server.run(stop)
    report = server.report()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ready.put(
        {
            "updates": report.updates,
            "waiting_seconds": report.waiting_seconds,
            "working_seconds": report.working_seconds,
            "megabytes_above_imports": (peak - imported) / 1024,
        }
    )


def _worker_process(
    number: int, addresses: Sequence[Any], elements: int, push: str, seconds: float, barrier: Any, out: SimpleQueue[Any]
) -> None:
    import torch

    from models.task import Parameter
    from paramserver.protocol.messages import ShardAddress
    from worker.attached import attach

    torch.set_num_threads(1)
    generator = np.random.default_rng(number)
    parts = {f"part{shard}": elements // len(addresses) for shard in range(len(addresses))}
    parameters = [Parameter(name, torch.zeros(size), "all") for name, size in parts.items()]
    gradients = {
        name: torch.from_numpy(generator.normal(0, 1e-3, size).astype(np.float32)) for name, size in parts.items()
    }
    shards = [ShardAddress(name, address, blocks) for name, address, blocks in addresses]
    with attach(parameters, shards, job="exchange", worker=f"worker-{number}", term=1, encoding=push) as attached:
        if number == 0:
            attached.initialise()
        barrier.wait(60)
        attached.pull()
        barrier.wait(60)
        out.put(peers.timed_cycles(lambda: attached.push(gradients), seconds))
        barrier.wait(60)


def ours(
    elements: int, shards: int, workers: int, seconds: float, push: str = "fp32", pull: str = "fp32",
    optimizer: str = "momentum",
) -> dict[str, Any]:  # fmt: skip
    """Cycles a second of all workers together, and what the shards say of themselves."""
    context = multiprocessing.get_context("spawn")
    ready, done, out = context.SimpleQueue(), context.SimpleQueue(), context.SimpleQueue()
    barrier = context.Barrier(workers)
    specification = _specification(push, pull, optimizer)
    servers = [
        context.Process(target=_shard_process, args=(n, shards, elements, specification, ready, done), daemon=True)
        for n in range(shards)
    ]
    for server in servers:
        server.start()
    addresses = [entry[1:] for entry in sorted(ready.get() for _ in range(shards))]
    clients = [
        context.Process(target=_worker_process, args=(n, addresses, elements, push, seconds, barrier, out), daemon=True)
        for n in range(workers)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join(seconds * 3 + 120)
    if any(client.exitcode != 0 for client in clients):
        raise RuntimeError(f"a worker of the benchmark ended with {[client.exitcode for client in clients]}")
    rate = sum(out.get() for _ in range(workers))
    for _ in servers:
        done.put(None)
    facts = [ready.get() for _ in range(shards)]
    for server in servers:
        server.join(30)
    return {"cycles_per_second": rate, "shards": facts}


def run(sizes: Sequence[int], rounds: int, seconds: float) -> None:
    """Print the table of rates, 1 shard x 1 worker and 2 x 2."""
    started = time.monotonic()
    rows, facts = [], []
    for elements in sizes:
        for count in (1, 2):
            rates: dict[str, list[float]] = {name: [] for name in (*OURS, RPC, GLOO)}
            memory = 0.0
            for _ in range(rounds):
                for name in OURS:
                    push, pull = name.partition(",")[0].split(" / ")
                    # The processes are started anew for each launch, and take this from us.
                    os.environ["PARAMSERVER_SHARED_MEMORY"] = "off" if name.endswith("sockets only") else "on"
                    result = ours(elements, count, count, seconds, push, pull)
                    rates[name].append(result["cycles_per_second"])
                    if name == OURS[0]:
                        memory = max(memory, *(shard["megabytes_above_imports"] for shard in result["shards"]))
                rates[RPC].append(peers.rpc_server(elements, count, count, seconds))
                if count > 1:
                    rates[GLOO].append(peers.all_reduce(elements, count, seconds))
            gigabytes = {name: [rate * elements * 8 / 1e9 for rate in found] for name, found in rates.items() if found}
            medians = {name: median(found) for name, found in gigabytes.items()}
            state = 2 * elements * 4 / count / 2**20  # weights and velocity of one shard
            for name in gigabytes:
                to_rpc = medians[name] / medians[RPC]
                to_gloo = f"{medians[name] / medians[GLOO]:.2f}" if GLOO in medians else "-"
                extra = f"{memory - state:.0f} MB" if name == OURS[0] else ""
                rows.append(
                    [f"{elements:,}", f"{count}x{count}", name, spread(gigabytes[name]), f"{median(rates[name]):.0f}",
                     f"{to_rpc:.2f}", to_gloo, extra]
                )  # fmt: skip
            facts.append({"elements": elements, "shards": count, "gigabytes_per_second": medians})
    show(
        "push + apply + pull, heavy-ball momentum on the server, loopback",
        ["parameters", "shards x workers", "who", "GB/s: median (range)", "cycles/s", "x RPC", "x gloo",
         "shard memory beside weights and state"],
        rows,
        {"benchmark": "exchange", "rounds": rounds, "results": facts, "seconds": time.monotonic() - started},
    )  # fmt: skip


def apply_rate(rounds: int, seconds: float, elements: int = 100_000) -> None:
    """Print how many updates a second one shard takes from one worker, and where its time goes.

    Updates alone: the worker keeps PIPELINE pushes on their way and pulls nothing.
    """
    rows, facts = [], []
    for optimizer in ("sgd", "adagrad", "adam"):
        for encoding in ("fp32", "int8"):
            results = [_push_only(elements, encoding, optimizer, seconds) for _ in range(rounds)]
            rates = [result["updates_per_second"] for result in results]
            waiting = [result["waiting_share"] for result in results]
            rows.append([optimizer, encoding, spread(rates), f"{100 * median(waiting):.0f}%"])
            facts.append({"optimizer": optimizer, "encoding": encoding, "updates_per_second": rates})
    show(
        f"one shard, one worker, updates of {elements:,} parameters",
        ["optimizer on the shard", "encoding", "updates a second: median (range)", "shard waiting"],
        rows,
        {"benchmark": "apply", "results": facts},
    )


PIPELINE = 8  # pushes on their way; a shard handles one at a time


def _push_only(elements: int, encoding: str, optimizer: str, seconds: float) -> dict[str, float]:
    from paramserver.encoding import make_encoding
    from paramserver.protocol.messages import BlockUpdate, Hello, Initialise, Push, Pushed, Welcome
    from paramserver.protocol.transport import Received
    from paramserver.protocol.zeromq import ZeroMQTransport

    context = multiprocessing.get_context("spawn")
    ready, done = context.SimpleQueue(), context.SimpleQueue()
    arguments = (0, 1, elements, _specification(encoding, "fp32", optimizer), ready, done)
    server = context.Process(target=_shard_process, args=arguments, daemon=True)
    server.start()
    _, _, address, _ = ready.get()
    layout, transport = _layout(elements, 1), ZeroMQTransport()
    channel = transport.connect(address)

    def answer(kind: type) -> Any:
        received = channel.receive(30)
        if not isinstance(received, Received) or not isinstance(received.message, kind):
            raise RuntimeError(f"expected {kind.__name__} from the shard, got {received}")
        return received.message

    coder = make_encoding(encoding)
    frame = np.empty(coder.frame_bytes(elements), np.uint8)
    values = np.random.default_rng(0).normal(0, 1e-3, elements).astype(np.float32)
    coder.encode(values, frame, np.zeros(elements, np.float32))
    identity = {"job": "exchange", "worker": "worker-0", "incarnation": 1}
    channel.send(Hello(**identity, layout=layout.fingerprint))
    answer(Welcome)
    initialise = Initialise(request=0, job="exchange", term=1, layout=layout.fingerprint, blocks=(0,))
    channel.send(initialise, [np.zeros(elements, np.float32).data])
    channel.receive(30)

    def push(sequence: int) -> None:
        update = BlockUpdate(
            0, sequence, sequence - 1 if sequence <= PIPELINE else sequence - PIPELINE, coder.identifier
        )
        channel.send(Push(request=sequence, term=1, step=sequence, updates=(update,), **identity), [frame.data])

    sent = 0
    for _ in range(PIPELINE):
        sent += 1
        push(sent)
    started, applied = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        if answer(Pushed).refused:
            raise RuntimeError("the shard refused an update of the benchmark")
        applied += 1
        sent += 1
        push(sent)
    elapsed = time.perf_counter() - started
    for _ in range(PIPELINE):
        answer(Pushed)
    channel.close()
    transport.close()
    done.put(None)
    report = ready.get()
    server.join(30)
    waiting, working = report["waiting_seconds"], report["working_seconds"]
    return {"updates_per_second": applied / elapsed, "waiting_share": waiting / (waiting + working)}
