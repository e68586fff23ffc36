"""Steps a second through a thin link, against torch DDP in the same run.

Every worker is behind a link of its own, held to the rate both ways; the shards are beyond it. The ranks of DDP
(gloo, fp32) are each behind one of the same links. Gradients are synthetic, so a step is its exchange and nothing
else, or with --computing a pause and then its exchange: nothing of it is hidden behind computation, for neither side.
Frames go through the link alone, never through shared memory.

What encodings of no fixed size take depends on the gradients. "uneven" ones are fresh noise every step (a few prepared
tensors in turn) whose segments of 2,048 elements differ in size as those of real gradients do: the root mean square
of a segment is log-normal, and stays the same from step to step. Its standard deviation is 0.4 decades: measured
over the first 400 steps of a char-LSTM were 0.33 to 0.49, of a PTB LSTM with tied embedding 0.80 to 0.86, where
adaptive bits would find more to spare. "white" noise has the same size everywhere. Encodings of a fixed size are
measured with one kind only, and DDP sends the same bytes whatever the gradients. The finer first updates of a new model
(push.settling_updates) are left out: a step is one of a job that has settled.

Needs root: network namespaces are made, and are gone when this ends, however it ends.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.network import (
    HUB_ADDRESS,
    Links,
    Traffic,
    congestion_control,
    end_address,
    in_namespace,
    plain_streams,
)
from benchmarks.options import make_parser, positive, rounds_of, seconds_of
from benchmarks.report import median, show, spread
from paramserver.cli.bench.choices import Ways, parse_pair, parse_sizes, short_size, synthetic_job
from paramserver.cli.bench.crew import QUIET, Crew, Line
from paramserver.cli.bench.exchange import (
    GRADIENT_SCALE,
    MOMENTUM,
    Rate,
    Shapes,
    attach_synthetic,
    follow_cycles,
    run_cycles,
    shared_memory,
    start_shards,
)

PAIRS = ("fp32/fp32", "int8/bf16")
DDP = "DDP fp32"
WORKERS = 2
LAYER = 1_000_000  # elements of a layer; the last one is shorter
DDP_PORT = 29_500  # in a namespace of its own every port is free
SEGMENT = 2048  # elements of equal size in uneven gradients
SPREAD_DECADES = {"uneven": 0.4, "white": 0.0}  # standard deviation of log10 of a segment's root mean square
PREPARED = 4  # gradients of a worker, in turn
OF_NO_FIXED_SIZE = {"adaptive", "coded"}


def shapes_of(parameters: int) -> Shapes:
    """A model of so many parameters, as layers."""
    starts = range(0, parameters, LAYER)
    return {f"layer{number}": (1, min(LAYER, parameters - start)) for number, start in enumerate(starts)}


# ------------------------------------------------------------------------------------ ours


@dataclass(frozen=True)
class Steps:
    """What a step of every worker is."""

    gradients: str = "uneven"
    computing_seconds: float = 0.0  # paused before each exchange
    slowed: float = 1.0  # times as long by the first worker

    def pause_seconds(self, worker: int) -> float:
        return self.computing_seconds * (self.slowed if worker == 0 else 1.0)


def ours(links: Links, parameters: int, shards: int, ways: Ways, seconds: float, steps: Steps) -> Rate:
    """Real shard processes in the hub, a worker in each end."""
    shapes, job = shapes_of(parameters), synthetic_job(ways, MOMENTUM)
    with Crew(shared_memory(False)) as crew:  # it would lead around the link
        servers, addresses = start_shards(
            crew, shapes, shards, job.json_text(), f"tcp://{HUB_ADDRESS}:0",
            lambda crew, name, target, *rest: crew.start(name, in_namespace, links.hub, target, *rest),
        )  # fmt: skip
        clients = [
            crew.start(
                f"worker-{n}", in_namespace, end, _worker, n, addresses, shapes, dict(ways.push), links.megabits, steps
            )
            for n, end in enumerate(links.ends)
        ]
        rate = run_cycles(crew, clients, seconds, servers)
        crew.join(clients)
        crew.end(servers)
    return rate


class Link(Traffic):
    """A worker's link and its counters: messages as they are counted, heads included."""

    def __init__(self, megabits: int, counters: Any) -> None:
        super().__init__(megabits)
        self._counters = counters
        self._before: dict[str, float] = {}

    def begin(self) -> None:
        self._before = self._counted()
        super().begin()

    def end(self) -> dict[str, float]:
        facts = super().end()
        return {**facts, **{name: value - self._before[name] for name, value in self._counted().items()}}

    def _counted(self) -> dict[str, float]:
        return {name: float(getattr(self._counters, name)) for name in ("push_bytes", "pull_bytes", "retries")}


def _worker(
    line: Line,
    number: int,
    addresses: Sequence[Any],
    shapes: Shapes,
    push: Mapping[str, Any],
    megabits: int,
    steps: Steps,
) -> None:
    import torch

    with attach_synthetic(number, addresses, shapes, push) as (attached, _):
        if number == 0:
            attached.initialise()
        prepared = cycle(
            [
                {name: torch.from_numpy(values) for name, values in gradients.items()}
                for gradients in prepare_gradients(steps.gradients, number, shapes)
            ]
        )

        pause_seconds = steps.pause_seconds(number)

        def step() -> None:
            time.sleep(pause_seconds)
            attached.push(next(prepared))

        watch = Link(megabits, attached.counters)
        follow_cycles(line, step, attached.pull, watch)


def prepare_gradients(kind: str, number: int, shapes: Shapes) -> list[dict[str, npt.NDArray[np.float32]]]:
    """A worker's gradients, to be used in turn. All workers have the same sizes of segments, as those of one model."""
    sizes = {}
    for name, shape in shapes.items():
        segments = -(-math.prod(shape) // SEGMENT)
        drawn = np.random.default_rng((0, *name.encode())).normal(0, SPREAD_DECADES[kind], segments)
        sizes[name] = np.repeat(GRADIENT_SCALE * 10**drawn, SEGMENT)[: math.prod(shape)].astype(np.float32)
    generator = np.random.default_rng((1, number))
    return [
        {
            name: (sizes[name] * generator.standard_normal(sizes[name].size, np.float32)).reshape(shape)
            for name, shape in shapes.items()
        }
        for _ in range(PREPARED)
    ]


# ------------------------------------------------------------------------------------- DDP


def ddp(links: Links, parameters: int, seconds: float, steps: Steps) -> Rate:
    """torch DistributedDataParallel over gloo, a rank in each end, fp32, SGD with momentum."""
    with Crew(QUIET) as crew:
        ranks = [
            crew.start(
                f"rank-{n}",
                in_namespace,
                end,
                _rank,
                n,
                len(links.ends),
                shapes_of(parameters),
                links.megabits,
                steps.pause_seconds(n),
            )
            for n, end in enumerate(links.ends)
        ]
        rate = run_cycles(crew, ranks, seconds)
        crew.join(ranks)
    return rate


def _rank(line: Line, rank: int, ranks: int, shapes: Shapes, megabits: int, computing_seconds: float) -> None:
    import torch
    import torch.distributed as dist

    from benchmarks.network import END_INTERFACE
    from benchmarks.peers import follow_together

    os.environ["GLOO_SOCKET_IFNAME"] = END_INTERFACE
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{end_address(0)}:{DDP_PORT}", rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(rank)

    class Model(torch.nn.Module):
        """Its gradient is whatever it is given: back-propagation costs one pass over the parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})
            self.wanted = {name: 1e-3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}

        def forward(self) -> torch.Tensor:
            return torch.stack(
                [layer.flatten() @ self.wanted[name].flatten() for name, layer in self.layers.items()]
            ).sum()

    model = torch.nn.parallel.DistributedDataParallel(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=MOMENTUM["lr"], momentum=MOMENTUM["momentum"])

    def step() -> None:
        time.sleep(computing_seconds)
        optimizer.zero_grad()
        model().backward()
        optimizer.step()

    follow_together(line, step, Traffic(megabits))
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------- report


def run(
    rates: Sequence[int],
    rounds: int,
    seconds: float,
    pairs: Sequence[str],
    parameters: int,
    shards: int,
    kinds: Sequence[str] = tuple(SPREAD_DECADES),
    computing_seconds: float = 0.0,
    workers: int = WORKERS,
    slowed: float = 1.0,
) -> None:
    """Print the table, by rate of the link in megabits a second; `kinds` of gradients."""
    started = time.monotonic()
    rows: list[list[str]] = []
    facts: list[dict[str, object]] = []
    wanted = [parse_pair(pair, "--pairs") for pair in pairs]
    for ways in wanted:
        synthetic_job(ways, MOMENTUM)  # a pair that no job may have is told before anything is measured
    for megabits in rates:
        with closing(Links(workers, megabits)) as links:
            plain = plain_streams(links, seconds / 3)
            launches: dict[str, Callable[[], Rate]] = {
                label: lambda ways=ways, kind=kind: ours(  # type: ignore[misc]
                    links, parameters, shards, ways, seconds, Steps(kind, computing_seconds, slowed)
                )
                for ways in wanted
                for kind, label in _labels(ways, kinds)
            }
            launches[DDP] = lambda: ddp(links, parameters, seconds, Steps(kinds[0], computing_seconds, slowed))
            found: dict[str, list[Rate]] = {name: [] for name in launches}
            for _ in range(rounds):
                for name, launch in launches.items():
                    found[name].append(launch())
        up, down = plain
        rows.append([f"{megabits}", "a TCP stream", "-", "-", f"{_percent(up / megabits)} {_percent(down / megabits)}",
                     "-", "-", "-", "-", "-"])  # fmt: skip
        for name, ones in found.items():
            one = _summary(ones, megabits)
            steps = [each.cycles_per_second for each in ones]
            ratio = median(steps) / median(each.cycles_per_second for each in found[DDP])
            rows.append([f"{megabits}", name, spread(steps), f"{ratio:.2f}", *_written(one)])
            facts.append({"megabits": megabits, "who": name, "steps_per_second": steps, "over_ddp": ratio, **one})
        facts.append({"megabits": megabits, "who": "a TCP stream", "up_megabits": up, "down_megabits": down})
    show(
        f"{short_size(parameters)} parameters, {workers} workers or ranks, {shards} shards beyond the links"
        f"{f', each step with a pause of {computing_seconds:g} s' if computing_seconds else ''}"
        f"{f', {slowed:g} times as long in the first one' if slowed != 1 else ''}; steps a second of all together.\n"
        "used: of the link, headers and all. busy: both ways/up alone/down alone/neither, in % of the time. "
        "/ payload: messages over what they carry. snapshots: sent instead of deltas in the timed part",
        ["Mbit/s", "who", "steps/s", "x DDP", "used: up down", "busy %", "bits up down", "/ payload", "resent",
         "snapshots"],
        rows,
        {"benchmark": "link", "parameters": parameters, "shards": shards, "rounds": rounds, "results": facts,
         "computing_seconds": computing_seconds, "workers": workers, "slowed": slowed, "spread_decades": SPREAD_DECADES,
         "congestion_control": congestion_control(), "seconds": time.monotonic() - started},
    )  # fmt: skip


def _labels(ways: Ways, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Which gradients a pair is measured with, and how that is called."""
    if not OF_NO_FIXED_SIZE & {str(ways.push["encoding"]), str(ways.pull["encoding"])}:
        return [(kinds[0], ways.label)]
    return [(kind, f"{ways.label}, {kind}") for kind in kinds]


def _summary(ones: Sequence[Rate], megabits: int) -> dict[str, Any]:
    """Over all rounds and ends: how the links were used, and what the messages held."""
    clients = [client for one in ones for client in one.clients]
    shards = [shard for one in ones for shard in one.shards]

    def total(parts: Sequence[Mapping[str, float]], name: str) -> float:
        return sum(part[name] for part in parts)

    seconds = total(clients, "seconds")
    capacity_bytes = megabits * 1e6 / 8 * seconds
    found: dict[str, Any] = {
        "up_used": total(clients, "sent_bytes") / capacity_bytes,
        "down_used": total(clients, "received_bytes") / capacity_bytes,
        "busy": {
            way: sum(client[way] * client["seconds"] for client in clients) / seconds
            for way in ("both", "up", "down", "idle")
        },
    }
    if shards:
        for way in ("push", "pull"):
            payload = total(shards, f"{way}_payload_bytes")
            found[f"{way}_bits_an_element"] = 8 * payload / total(shards, f"{way}_elements")
            found[f"{way}_message_bytes_over_payload"] = total(clients, f"{way}_bytes") / payload
        found["resent_messages"] = total(clients, "retries")
        found["snapshots"] = total(shards, "pull_snapshots")
    return found


def _written(one: Mapping[str, Any]) -> list[str]:
    used = f"{_percent(one['up_used'])} {_percent(one['down_used'])}"
    busy = "/".join(f"{100 * one['busy'][way]:.0f}" for way in ("both", "up", "down", "idle"))
    if "push_bits_an_element" not in one:
        return [used, busy, "32.00", "-", "-", "-"]
    over = [f"{one[f'{way}_message_bytes_over_payload']:.3f}" for way in ("push", "pull")]
    bits = [f"{one[f'{way}_bits_an_element']:.2f}" for way in ("push", "pull")]
    return [used, busy, " ".join(bits), " ".join(over), f"{one['resent_messages']:.0f}", f"{one['snapshots']:.0f}"]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def main(arguments: Sequence[str]) -> None:
    parser = make_parser("link", __doc__, rounds=3, seconds=9.0)
    parser.add_argument("--rates", default="100,1000", help="megabits a second, each way (default %(default)s)")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="PUSH/PULL", help="ours (default: %(default)s)")
    parser.add_argument("--parameters", default="10M", help="of the model (default %(default)s)")
    parser.add_argument("--shards", default="2", help="beyond the links (default %(default)s)")
    parser.add_argument(
        "--gradients", nargs="+", choices=SPREAD_DECADES, default=tuple(SPREAD_DECADES), metavar="KIND",
        help="uneven or white, for encodings of no fixed size (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--computing", type=float, default=0.0, metavar="SECONDS", help="a pause before each exchange (default none)"
    )
    parser.add_argument("--workers", type=positive, default=WORKERS, help="as many links (default %(default)s)")
    parser.add_argument(
        "--slowed", type=float, default=1.0, metavar="TIMES", help="pauses of the first worker, over the others'"
    )
    given = parser.parse_args(arguments)
    run(
        parse_sizes(given.rates, "--rates"),
        rounds_of(given),
        seconds_of(given),
        given.pairs,
        parse_sizes(given.parameters, "--parameters")[0],
        parse_sizes(given.shards, "--shards")[0],
        given.gradients,
        given.computing,
        given.workers,
        given.slowed,
    )
