"""Steps a second through a thin link, against torch DDP in the same run.

Every worker is behind a link of its own, held to the rate both ways; the shards are beyond it. The ranks of DDP
(gloo, fp32) are each behind one of the same links. Gradients are synthetic, so a step is its exchange and nothing
else: nothing of it is hidden behind computation, for neither side. Frames go through the link alone, never through
shared memory.

Needs root: network namespaces are made, and are gone when this ends, however it ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from benchmarks.network import (
    HUB_ADDRESS,
    Links,
    Traffic,
    congestion_control,
    end_address,
    in_namespace,
    plain_streams,
)
from benchmarks.options import make_parser, rounds_of, seconds_of
from benchmarks.report import median, show, spread
from paramserver.cli.bench.choices import Ways, parse_pair, parse_sizes, short_size, synthetic_job
from paramserver.cli.bench.crew import QUIET, Crew, Line
from paramserver.cli.bench.exchange import (
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


def shapes_of(parameters: int) -> Shapes:
    """A model of so many parameters, as layers."""
    starts = range(0, parameters, LAYER)
    return {f"layer{number}": (1, min(LAYER, parameters - start)) for number, start in enumerate(starts)}


# ------------------------------------------------------------------------------------ ours


def ours(links: Links, parameters: int, shards: int, ways: Ways, seconds: float) -> Rate:
    """Real shard processes in the hub, a worker in each end."""
    shapes, job = shapes_of(parameters), synthetic_job(ways, MOMENTUM)
    with Crew(shared_memory(False)) as crew:  # it would lead around the link
        servers, addresses = start_shards(
            crew, shapes, shards, job.json_text(), f"tcp://{HUB_ADDRESS}:0",
            lambda crew, name, target, *rest: crew.start(name, in_namespace, links.hub, target, *rest),
        )  # fmt: skip
        clients = [
            crew.start(f"worker-{n}", in_namespace, end, _worker, n, addresses, shapes, dict(ways.push), links.megabits)
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
    line: Line, number: int, addresses: Sequence[Any], shapes: Shapes, push: Mapping[str, Any], megabits: int
) -> None:
    with attach_synthetic(number, addresses, shapes, push) as (attached, gradients):
        if number == 0:
            attached.initialise()
        watch = Link(megabits, attached.counters)
        follow_cycles(line, lambda: attached.push(gradients), attached.pull, watch)


# ------------------------------------------------------------------------------------- DDP


def ddp(links: Links, parameters: int, seconds: float) -> Rate:
    """torch DistributedDataParallel over gloo, a rank in each end, fp32, SGD with momentum."""
    with Crew(QUIET) as crew:
        ranks = [
            crew.start(f"rank-{n}", in_namespace, end, _rank, n, len(links.ends), shapes_of(parameters), links.megabits)
            for n, end in enumerate(links.ends)
        ]
        rate = run_cycles(crew, ranks, seconds)
        crew.join(ranks)
    return rate


def _rank(line: Line, rank: int, ranks: int, shapes: Shapes, megabits: int) -> None:
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

    def cycle() -> None:
        optimizer.zero_grad()
        model().backward()
        optimizer.step()

    follow_together(line, cycle, Traffic(megabits))
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------- report


def run(rates: Sequence[int], rounds: int, seconds: float, pairs: Sequence[str], parameters: int, shards: int) -> None:
    """Print the table, by rate of the link in megabits a second."""
    started = time.monotonic()
    rows: list[list[str]] = []
    facts: list[dict[str, object]] = []
    wanted = [parse_pair(pair, "--pairs") for pair in pairs]
    for ways in wanted:
        synthetic_job(ways, MOMENTUM)  # a pair that no job may have is told before anything is measured
    for megabits in rates:
        with closing(Links(WORKERS, megabits)) as links:
            plain = plain_streams(links, seconds / 3)
            launches: dict[str, Callable[[], Rate]] = {
                ways.label: lambda ways=ways: ours(links, parameters, shards, ways, seconds)  # type: ignore[misc]
                for ways in wanted
            }
            launches[DDP] = lambda: ddp(links, parameters, seconds)
            found: dict[str, list[Rate]] = {name: [] for name in launches}
            for _ in range(rounds):
                for name, launch in launches.items():
                    found[name].append(launch())
        up, down = plain
        rows.append([f"{megabits}", "a TCP stream", "-", "-", f"{_percent(up / megabits)} {_percent(down / megabits)}",
                     "-", "-", "-", "-"])  # fmt: skip
        for name, ones in found.items():
            one = _summary(ones, megabits)
            steps = [each.cycles_per_second for each in ones]
            ratio = median(steps) / median(each.cycles_per_second for each in found[DDP])
            rows.append([f"{megabits}", name, spread(steps), f"{ratio:.2f}", *_written(one)])
            facts.append({"megabits": megabits, "who": name, "steps_per_second": steps, "over_ddp": ratio, **one})
        facts.append({"megabits": megabits, "who": "a TCP stream", "up_megabits": up, "down_megabits": down})
    show(
        f"{short_size(parameters)} parameters, {WORKERS} workers or ranks, {shards} shards beyond the links; "
        "steps a second of both together.\n"
        "used: of the link, headers and all. busy: both ways/up alone/down alone/neither, in % of the time. "
        "/ payload: messages over what they carry",
        ["Mbit/s", "who", "steps/s", "x DDP", "used: up down", "busy %", "bits up down", "/ payload", "resent"],
        rows,
        {"benchmark": "link", "parameters": parameters, "shards": shards, "rounds": rounds, "results": facts,
         "congestion_control": congestion_control(), "seconds": time.monotonic() - started},
    )  # fmt: skip


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
    return found


def _written(one: Mapping[str, Any]) -> list[str]:
    used = f"{_percent(one['up_used'])} {_percent(one['down_used'])}"
    busy = "/".join(f"{100 * one['busy'][way]:.0f}" for way in ("both", "up", "down", "idle"))
    if "push_bits_an_element" not in one:
        return [used, busy, "32.00", "-", "-"]
    over = [f"{one[f'{way}_message_bytes_over_payload']:.3f}" for way in ("push", "pull")]
    bits = [f"{one[f'{way}_bits_an_element']:.2f}" for way in ("push", "pull")]
    return [used, busy, " ".join(bits), " ".join(over), f"{one['resent_messages']:.0f}"]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def main(arguments: Sequence[str]) -> None:
    parser = make_parser("link", __doc__, rounds=3, seconds=9.0)
    parser.add_argument("--rates", default="100,1000", help="megabits a second, each way (default %(default)s)")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="PUSH/PULL", help="ours (default: %(default)s)")
    parser.add_argument("--parameters", default="10M", help="of the model (default %(default)s)")
    parser.add_argument("--shards", default="2", help="beyond the links (default %(default)s)")
    given = parser.parse_args(arguments)
    run(
        parse_sizes(given.rates, "--rates"),
        rounds_of(given),
        seconds_of(given),
        given.pairs,
        parse_sizes(given.parameters, "--parameters")[0],
        parse_sizes(given.shards, "--shards")[0],
    )
