"""A char-LSTM end to end: steps a second of two workers, all equally fast and with one of them slowed 4x.

Batch 16 x 64, plain SGD without clipping, one thread a process, the same text and model for all:

* ours: real shard processes and the worker's own training loop (worker/train.py) over the library's exchange.
  Leases come from the benchmark in the coordinator's place; a job under `paramserver run` stands beside it.
* Hogwild: processes that read and write the same parameters in torch's shared memory, without locks.
* DDP: torch DistributedDataParallel over gloo, one step of all ranks at a time.

The slow worker sleeps, in each step, three times what a step of one process alone takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from benchmarks.options import make_parser, rounds_of, seconds_of
from benchmarks.peers import follow_together, free_port
from benchmarks.plain import lease_order, training_batches
from benchmarks.report import median, show, spread
from models.recurrent.arguments import RecurrentArguments, RecurrentData
from models.recurrent.corpus import NOT_PREDICTED, load_corpus
from models.recurrent.task import RecurrentTask, Window
from models.task import Parameter, Step
from paramserver.cli.bench.choices import Ways, parse_pair, parse_sizes, synthetic_job
from paramserver.cli.bench.crew import QUIET, Crew, Line, MeasurementError
from paramserver.cli.bench.exchange import Rate, Unwatched, follow_cycles, run_cycles, start_shards
from worker.device import keep_freed_memory, limit_threads

PAIRS = ("fp32/fp32", "int8/bf16")
ARGUMENTS = RecurrentArguments(task="char-lm", cell="lstm", hidden=200)
DATA = RecurrentData(name="python-source", batch=16, window=64)
LEARNING_RATE = 0.1
SGD = {"name": "sgd", "lr": LEARNING_RATE, "clip": None}
WORKERS = 2
SLOWED = 4  # times
ONE, HOGWILD, DDP, JOB = "one process", "Hogwild", "DDP", "paramserver run "
JOB_WARM_SHARE = 0.3  # of a job's steps, which begin while its processes still start


def build_task(seed: int = 0) -> RecurrentTask:
    """The same model in every process, which computes with one thread and keeps its memory as a worker process does."""
    limit_threads(1)
    keep_freed_memory()
    return RecurrentTask(ARGUMENTS, DATA, load_corpus(ARGUMENTS, DATA), seed, torch.device("cpu"))


class SlowTask:
    """A task whose every step takes longer by so many seconds."""

    def __init__(self, task: RecurrentTask, slow_seconds: float) -> None:
        self._task = task
        self._slow_seconds = slow_seconds
        self.parameters, self.examples, self.batches = task.parameters, task.examples, task.batches

    def gradients(self, batch: Window) -> Step:
        step = self._task.gradients(batch)
        time.sleep(self._slow_seconds)
        return step


# ------------------------------------------------------------------------------------ ours


class LeasesOfTheBench:
    """A LeaseSource without a coordinator: seeded leases, until warm-up and timed part are over."""

    def __init__(self, line: Line, examples: int, worker: int, steps: Callable[[], int]) -> None:
        self._orders = (lease for epoch in count() for lease in lease_order(examples, DATA.batch, worker, epoch))
        self._numbers = count()
        self._going_on = self._phases(line, steps)

    @staticmethod
    def _phases(line: Line, steps: Callable[[], int]) -> Iterator[bool]:
        line.say(None)
        warm_until = line.hear() + time.perf_counter()
        while time.perf_counter() < warm_until:
            yield True
        line.say(None)
        seconds = line.hear()
        started, before = time.perf_counter(), steps()
        while time.perf_counter() - started < seconds:
            yield True
        line.say((steps() - before, time.perf_counter() - started, Unwatched().end()))
        line.hear()
        while True:
            yield False

    def is_wanted(self) -> bool:
        return next(self._going_on)

    def is_leaving(self) -> bool:
        return False

    def next_lease(self) -> Any:
        from paramserver.protocol.messages import Lease

        return Lease(number=next(self._numbers), kind="train", examples=tuple(next(self._orders)))

    def wait_lease(self) -> None:
        raise AssertionError("there is always a lease")

    def finish(self, result: Any) -> None:
        pass


def ours(ways: Ways, shards: int, slow_seconds: float, seconds: float, log: str = "none", backups: int = 0) -> Rate:
    """`log` and `backups` as a job's durability has them."""
    shapes = {parameter.name: tuple(parameter.tensor.shape) for parameter in build_task().parameters()}
    job = synthetic_job(ways, SGD, log)
    with tempfile.TemporaryDirectory(prefix="paramserver-bench-") as state, Crew() as crew:
        servers, addresses = start_shards(crew, shapes, shards, job.json_text(), state=state, has_backups=backups > 0)
        clients = [
            crew.start(f"worker-{n}", _worker, n, addresses, job.json_text(), slow_seconds * (n > 0))
            for n in range(WORKERS)
        ]
        rate = run_cycles(crew, clients, seconds)
        crew.join(clients)
        crew.end(servers)
    return rate


def _worker(line: Line, number: int, addresses: Sequence[Any], specification: str, slow_seconds: float) -> None:
    from paramserver.job import Job
    from paramserver.protocol.zeromq import ZeroMQTransport
    from worker.client import Identity
    from worker.counters import Counters
    from worker.exchange import Codec, Exchange
    from worker.replica import Replica
    from worker.runner import PATIENCE
    from worker.train import Trainer

    push = Job.model_validate_json(specification).push
    task = SlowTask(build_task(), slow_seconds)
    replica = Replica([Parameter(one.name, one.tensor, "all") for one in task.parameters()])
    transport, counters = ZeroMQTransport(), Counters()
    identity = Identity("bench", f"worker-{number}", 1, replica.layout.fingerprint)
    codec = Codec(push.encodings(replica.layout), push.deadline_seconds, push.error)
    exchange = Exchange(transport, addresses, identity, replica, codec, counters)
    if number == 0:
        exchange.initialise()
    exchange.pull(0)
    source = LeasesOfTheBench(line, task.examples("train"), number, lambda: counters.steps)
    Trainer(task, replica, exchange, source, counters, None, PATIENCE[push.overlap]).run()  # type: ignore[arg-type]
    exchange.close()
    transport.close()


def as_a_job(ways: Ways, shards: int, seconds: float, steps_per_second: float) -> float:
    """Steps a second of all workers in a job under `paramserver run`, as its metrics tell them."""
    content: dict[str, Any] = {
        "name": "lstm",
        "model": {"family": "recurrent", "args": ARGUMENTS.model_dump(mode="json")},
        "data": DATA.model_dump(mode="json"),
        "cluster": {"shards": shards, "workers": WORKERS},
        "push": dict(ways.push),
        "pull": dict(ways.pull),
        "optimizer": SGD,
        "stop": {"steps": int((seconds + 8) * steps_per_second), "epochs": 1000},  # its first seconds do not count
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.yaml")
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        command = [sys.executable, "-m", "paramserver.cli", "run", str(path), "--runs", folder, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MeasurementError(f"{JOB.strip()} ended with exit code {done.returncode}:\n{done.stderr}")
        lines = Path(folder, "lstm", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [point for point in map(json.loads, lines) if point["state"] == "training"]
    points = [point for point in points if point["steps"] >= JOB_WARM_SHARE * content["stop"]["steps"]]
    if len(points) < 3:
        raise MeasurementError("a job that trains for so short a time says no rate; give more --seconds")
    first, last = points[0], points[-1]
    return float((last["steps"] - first["steps"]) / (last["seconds"] - first["seconds"]))


# ------------------------------------------------------------------------------- the peers


def hogwild(processes: int, slow_seconds: float, seconds: float) -> Rate:
    """Recht et al. 2011, as torch's own example has it; with one process it is plain SGD."""
    shared = {parameter.name: parameter.tensor.detach().clone() for parameter in build_task().parameters()}
    for tensor in shared.values():
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    with Crew(QUIET) as crew:
        started = [crew.start(f"process-{n}", _wild, n, shared, slow_seconds * (n > 0)) for n in range(processes)]
        rate = run_cycles(crew, started, seconds)
        crew.join(started)
    return rate


def _wild(line: Line, number: int, shared: dict[str, Tensor], slow_seconds: float) -> None:
    task = build_task()
    for parameter in task.parameters():
        parameter.tensor.data = shared[parameter.name]
    tensors = [parameter.tensor for parameter in task.parameters()]
    slowed, windows = SlowTask(task, slow_seconds), training_batches(task, DATA.batch, number)

    def step() -> None:
        gradients = slowed.gradients(next(windows)).gradients
        with torch.no_grad():
            for tensor, gradient in zip(tensors, gradients.values(), strict=True):
                tensor.sub_(gradient, alpha=LEARNING_RATE)

    follow_cycles(line, step)


def ddp(slow_seconds: float, seconds: float) -> Rate:
    port = free_port()
    with Crew(QUIET) as crew:
        ranks = [crew.start(f"rank-{n}", _rank, n, port, slow_seconds * (n > 0)) for n in range(WORKERS)]
        rate = run_cycles(crew, ranks, seconds)
        crew.join(ranks)
    return rate


def _rank(line: Line, rank: int, port: int, slow_seconds: float) -> None:
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    task = build_task()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORKERS)
    net = torch.nn.parallel.DistributedDataParallel(task.net)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    windows = training_batches(task, DATA.batch, rank)
    carried: tuple[Tensor, Tensor] | None = None

    def step() -> None:
        nonlocal carried
        window = next(windows)
        logits, state = net(window.inputs, carried if window.index else None)
        carried = (state[0].detach(), state[1].detach())
        targets = window.targets.t().reshape(-1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=NOT_PREDICTED, reduction="sum")
        time.sleep(slow_seconds)  # before the gradients are summed, which begins inside of backward
        optimizer.zero_grad()
        (loss / window.elements).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    follow_together(line, step)
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------- report


def run(rounds: int, seconds: float, pairs: Sequence[str], shards: int, is_job: bool) -> None:
    """Print the table."""
    began = time.monotonic()
    wanted = {ways.label: ways for ways in (parse_pair(pair, "--pairs") for pair in pairs)}
    for ways in wanted.values():
        synthetic_job(ways, SGD)  # a pair that no job may have is told before anything is measured
    launches: dict[str, Callable[[float], Rate]] = {
        name: lambda slow, ways=ways: ours(ways, shards, slow, seconds)  # type: ignore[misc]
        for name, ways in wanted.items()
    }
    launches[HOGWILD] = lambda slow: hogwild(WORKERS, slow, seconds)
    launches[DDP] = lambda slow: ddp(slow, seconds)
    alone: list[float] = []
    even: dict[str, list[Rate]] = {name: [] for name in launches}
    uneven: dict[str, list[Rate]] = {name: [] for name in launches}
    jobs: dict[str, list[float]] = {name: [] for name in wanted}
    for _ in range(rounds):
        alone.append(hogwild(1, 0.0, seconds).cycles_per_second)
        slow_seconds = (SLOWED - 1) / alone[-1]
        for name, launch in launches.items():
            even[name].append(launch(0.0))
            uneven[name].append(launch(slow_seconds))
            if is_job and name in wanted:
                jobs[name].append(as_a_job(wanted[name], shards, seconds, even[name][-1].cycles_per_second))
    _report(alone, even, uneven, jobs if is_job else {}, shards, rounds, began)


def _report(
    alone: list[float],
    even: dict[str, list[Rate]],
    uneven: dict[str, list[Rate]],
    jobs: dict[str, list[float]],
    shards: int,
    rounds: int,
    began: float,
) -> None:
    together = {name: [one.cycles_per_second for one in ones] for name, ones in even.items()}
    reference = {name: median(together[name]) for name in (HOGWILD, DDP)}
    rows = [[ONE, spread(alone), "-", "-", "-", "-"]]
    facts: list[dict[str, Any]] = [{"who": ONE, "steps_per_second": alone}]

    def ratios(rates: list[float]) -> list[str]:
        return [f"{median(rates) / reference[name]:.2f}" for name in (HOGWILD, DDP)]

    for name, rates in together.items():
        slowed = [one.cycles_per_second for one in uneven[name]]
        kept = [
            hindered.by_client[0] / free.by_client[0] for free, hindered in zip(even[name], uneven[name], strict=True)
        ]
        rows.append([name, spread(rates), *ratios(rates), spread(slowed), f"{100 * median(kept):.0f}%"])
        facts.append(
            {"who": name, "steps_per_second": rates, "with_one_slow": slowed, "fast_worker_keeps": kept}
        )  # fmt: skip
        if jobs.get(name):
            rows.append([JOB + name, spread(jobs[name]), *ratios(jobs[name]), "-", "-"])
            facts.append({"who": JOB + name, "steps_per_second": jobs[name]})
    show(
        f"char-LSTM, batch 16 x 64, {WORKERS} workers of one thread, {shards} shards; steps a second of all together",
        ["who", "steps/s: median (range)", "x Hogwild", "x DDP", f"one {SLOWED}x slower", "fast one keeps"],
        rows,
        {"benchmark": "lstm", "shards": shards, "rounds": rounds, "results": facts,
         "seconds": time.monotonic() - began},
    )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    parser = make_parser("lstm", __doc__, rounds=5, seconds=9.0)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="PUSH/PULL", help="ours (default: %(default)s)")
    parser.add_argument("--shards", default="2", help="of ours (default %(default)s)")
    parser.add_argument("--no-job", action="store_true", help="leave `paramserver run` out")
    given = parser.parse_args(arguments)
    shards = parse_sizes(given.shards, "--shards")[0]
    run(rounds_of(given), seconds_of(given), given.pairs, shards, not (given.no_job or given.quick))
