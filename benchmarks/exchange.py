"""Exchange rate (push + apply + pull) by model size, against what a torch user would build instead.

Real shard and worker processes of this project (`paramserver bench exchange` measures the same ones),
synthetic gradients. Launches of ours and of the peers alternate, so that a drift of the machine's speed
meets all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from benchmarks import peers
from benchmarks.options import make_parser, rounds_of, seconds_of
from benchmarks.report import median, show, spread
from paramserver.cli.bench.choices import Ways, parse_pair, parse_sizes, short_size
from paramserver.cli.bench.exchange import PEAK, Rate, Setting, measure

PAIRS = ("fp32/fp32", "int8/bf16")
RPC, GLOO, SOCKETS = "torch RPC", "gloo", ", tcp"
SIZES = (100_000, 1_000_000, 10_000_000)
LARGE = 50_000_000


def run(
    sizes: Sequence[int] = SIZES,
    rounds: int = 5,
    seconds: float = 3.0,
    pairs: Sequence[str] = PAIRS,
    grids: Sequence[int] = (1, 2),
) -> None:
    """Print the table of rates, by size and by shards x workers (or ranks)."""
    started = time.monotonic()
    rows: list[list[str]] = []
    facts: list[dict[str, object]] = []
    for elements in sizes:
        for count in grids:
            launches = _launches(elements, count, seconds, pairs)
            found: dict[str, list[Rate]] = {name: [] for name in launches}
            for _ in range(rounds):
                for name, launch in launches.items():
                    found[name].append(launch())
            _report(elements, count, found, rows, facts)
    show(
        "push + apply + pull, heavy-ball momentum on the server, loopback; GB of float32 parameters pushed + pulled",
        ["size", "grid", "who", "GB/s: median (range)", "cycles/s", "x RPC", "x gloo", "CPU s/GB", "MB beside"],
        rows,
        {"benchmark": "exchange", "rounds": rounds, "results": facts, "seconds": time.monotonic() - started},
    )


def _launches(elements: int, count: int, seconds: float, pairs: Sequence[str]) -> dict[str, Callable[[], Rate]]:
    """What is compared, by its name in the table. The first pair is measured over sockets alone as well."""

    def ours(ways: Ways, is_shared: bool) -> Callable[[], Rate]:
        setting = Setting(elements, count, count, seconds, ways, is_memory_shared=is_shared)
        return lambda: measure(setting)

    ways = [parse_pair(pair, "--pairs") for pair in pairs]
    launches = {one.label: ours(one, True) for one in ways}
    launches[ways[0].label + SOCKETS] = ours(ways[0], False)
    launches[RPC] = lambda: peers.rpc_server(elements, count, count, seconds)
    if count > 1:
        launches[GLOO] = lambda: peers.all_reduce(elements, count, seconds)
    return launches


def _report(
    elements: int,
    count: int,
    found: Mapping[str, Sequence[Rate]],
    rows: list[list[str]],
    facts: list[dict[str, object]],
) -> None:
    rates = {name: [one.gigabytes_per_second(elements) for one in ones] for name, ones in found.items()}
    medians = {name: median(ones) for name, ones in rates.items()}
    state_megabytes = 2 * elements * 4 / count / 2**20  # weights and velocity of one shard
    for name, ones in found.items():
        cycles = median(one.cycles_per_second for one in ones)
        used = [each for one in ones if (each := one.cpu_seconds_per_gigabyte(elements)) is not None]
        peaks = [shard[PEAK] for one in ones for shard in one.shards]
        beside = max(peaks) - state_megabytes if peaks else None
        rows.append(
            [short_size(elements), f"{count}x{count}", name, spread(rates[name]), f"{cycles:.0f}",
             f"{medians[name] / medians[RPC]:.2f}", f"{medians[name] / medians[GLOO]:.2f}" if GLOO in found else "-",
             f"{median(used):.2f}" if used else "-", "-" if beside is None else f"{beside:.0f}"]
        )  # fmt: skip
        facts.append(
            {"elements": elements, "shards": count, "workers": count, "who": name, "gigabytes_per_second": rates[name],
             "cycles_per_second": cycles, "cpu_seconds_per_gigabyte": used, "shard_megabytes_beside": beside}
        )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    parser = make_parser("exchange", __doc__)
    parser.add_argument("--sizes", default=",".join(map(short_size, SIZES)), help="parameters (default %(default)s)")
    parser.add_argument("--large", action="store_true", help=f"{short_size(LARGE)} parameters as well")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="PUSH/PULL", help="ours (default: %(default)s)")
    parser.add_argument("--grids", default="1,2", help="shards = workers (default %(default)s)")
    given = parser.parse_args(arguments)
    grids = parse_sizes(given.grids, "--grids")
    sizes = parse_sizes(given.sizes, "--sizes", least=max(grids)) + [LARGE] * given.large
    run(sizes, rounds_of(given), seconds_of(given), given.pairs, grids)
