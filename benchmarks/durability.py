"""What it costs that nothing is lost: the exchange alone and a char-LSTM, with no journal, with one, with a backup.

Two shards, two workers, `int4` both ways unless --pair says otherwise. The exchange only pushes and pulls (momentum on
the shards); the LSTM is that of `lstm`, one thread a process. Journals lie where temporary files do: TMPDIR says which
disk is measured. Launches take turns, and each setting's share is of the `none` of its own round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.lstm import ours
from benchmarks.options import make_parser, rounds_of, seconds_of
from benchmarks.report import median, show, spread
from paramserver.cli.bench.choices import Ways, parse_pair, parse_sizes
from paramserver.cli.bench.exchange import Rate, Setting, measure

PAIR = "int4/int4"
SIZES = "1M,10M"
SHARDS = WORKERS = 2
LSTM = "char-LSTM"


class Durability(NamedTuple):
    """`log` of the job, and how many backups a shard has."""

    log: str
    backups: int

    @property
    def label(self) -> str:
        return f"{self.log} + backup" if self.backups else self.log


NONE = Durability("none", 0)
ALL = (NONE, Durability("journal", 0), Durability("journal", 1), Durability("journal+fsync", 0))

Launch = Callable[[Durability], Rate]


def launches(ways: Ways, sizes: Sequence[int], seconds: float) -> dict[str, Launch]:
    """What is measured, by its name in the table."""
    found: dict[str, Launch] = {}
    for elements in sizes:

        def exchange(how: Durability, elements: int = elements) -> Rate:
            return measure(Setting(elements, SHARDS, WORKERS, seconds, ways, log=how.log, backups=how.backups))

        found[f"exchange, {elements:,} parameters"] = exchange
    found[LSTM] = lambda how: ours(ways, SHARDS, 0.0, 3 * seconds, how.log, how.backups)
    return found


def run(rounds: int, seconds: float, pair: str, sizes: Sequence[int]) -> None:
    """Print the table."""
    began = time.monotonic()
    ways = parse_pair(pair, "--pair")
    rows: list[list[str]] = []
    facts: list[dict[str, Any]] = []
    for what, launch in launches(ways, sizes, seconds).items():
        rates: dict[Durability, list[Rate]] = {how: [] for how in ALL}
        for _ in range(rounds):
            for how in ALL:
                rates[how].append(launch(how))
        for how, own in rates.items():
            cycles = [one.cycles_per_second for one in own]
            kept = [one / base.cycles_per_second for one, base in zip(cycles, rates[NONE], strict=True)]
            rows.append([what, how.label, spread(cycles), f"{100 * (1 - median(kept)):.1f}%"])
            facts.append({"what": what, "durability": how.label, "cycles_per_second": cycles, "kept": kept})
    show(
        f"{ways.label}, {SHARDS} shards x {WORKERS} workers; cycles (steps) a second of all together",
        ["what", "durability", "cycles/s: median (range)", "costs"],
        rows,
        {"benchmark": "durability", "pair": pair, "rounds": rounds, "results": facts,
         "seconds": time.monotonic() - began},
    )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    parser = make_parser("durability", __doc__, rounds=3, seconds=3.0)
    parser.add_argument("--pair", default=PAIR, metavar="PUSH/PULL", help="encodings (default %(default)s)")
    parser.add_argument("--sizes", default=SIZES, help="of the exchange (default %(default)s)")
    given = parser.parse_args(arguments)
    run(rounds_of(given), seconds_of(given), given.pair, parse_sizes(given.sizes, "--sizes"))
