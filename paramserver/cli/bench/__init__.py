"""`bench codec | exchange | wire`: how fast this machine encodes, exchanges and sends. Nothing heavy is imported here.

benchmarks/ of the source measures the same beside peers; the measuring itself is in this folder alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from paramserver.cli.bench.choices import parse_sizes, parse_ways, short_size
from paramserver.cli.errors import FailedError, InputError
from paramserver.cli.job_file import AsJson

group = typer.Typer(help="Measure this machine.", no_args_is_help=True)

Rounds = Annotated[int, typer.Option(min=1, max=1000, help="Repetitions; medians are shown.")]
Seconds = Annotated[float, typer.Option(min=0.05, max=3600, help="Length of one timed part.")]
Optimizer = Annotated[str, typer.Option(help="What applies the values: a name as in a job's optimizer.name.")]
T = TypeVar("T")


@group.callback()
def _group() -> None:
    """Measure this machine."""


@group.command("codec")
def bench_codec(
    encodings: Annotated[str, typer.Option(help="Names with commas between; all that there are by default.")] = "",
    sizes: Annotated[str, typer.Option(help="Elements, for example 1M,16M.")] = "1M,16M",
    tile: Annotated[int, typer.Option(help="Elements that share a scale.")] = 64,
    optimizer: Optimizer = "momentum",
    rounds: Rounds = 7,
    as_json: AsJson = False,
) -> None:
    """Time each encoding against a memcpy of the same array: encode, publish, and decode + apply, on one thread."""
    from paramserver.cli.bench import codec
    from paramserver.cli.bench.report import show
    from paramserver.encoding import encoding_names

    names = [name.strip() for name in encodings.split(",")] if encodings else encoding_names()
    works = (codec.ENCODE, codec.PUBLISH)
    cells = codec.measure(names, [tile], parse_sizes(sizes, "--sizes"), works, [{"name": optimizer}], rounds)
    rows: list[list[str]] = []
    facts: list[dict[str, object]] = []
    for row in codec.by_encoding(cells):
        encode, publish, apply = row[codec.ENCODE], row[codec.PUBLISH], row[optimizer]
        rows.append(
            [encode.encoding, short_size(encode.elements), f"{encode.bits:.2f}", f"{1e3 * encode.memcpy_seconds:.3f}",
             f"{encode.ratio:.2f}", f"{publish.ratio:.2f}", f"{apply.ratio:.2f}", f"{encode.gigabytes_per_second:.1f}"]
        )  # fmt: skip
        facts.append(
            {"encoding": encode.encoding, "elements": encode.elements, "bits_an_element": encode.bits,
             "memcpy_seconds": encode.memcpy_seconds, "encode_over_memcpy": encode.ratio,
             "publish_over_memcpy": publish.ratio, "apply_over_memcpy": apply.ratio}
        )  # fmt: skip
    show(
        f"one thread, decode + {optimizer}; x memcpy: time over a copy of the same float32 array",
        ["encoding", "elements", "bits", "memcpy ms", "encode x memcpy", "publish x memcpy", "apply x memcpy",
         "encode GB/s"],
        rows,
        {"benchmark": "codec", "tile": tile, "optimizer": optimizer, "rounds": rounds, "results": facts},
        as_json,
    )  # fmt: skip


@group.command("exchange")
def bench_exchange(
    push: Annotated[str, typer.Option(help="Encoding of updates: a name, or a job's push section as YAML.")] = "fp32",
    pull: Annotated[str, typer.Option(help="Encoding of values, likewise.")] = "fp32",
    sizes: Annotated[str, typer.Option(help="Parameters of the model, for example 100k,1M,10M.")] = "100k,1M,10M",
    shards: Annotated[int, typer.Option(min=1, max=64)] = 2,
    workers: Annotated[int, typer.Option(min=1, max=64)] = 2,
    optimizer: Optimizer = "momentum",
    rounds: Rounds = 3,
    seconds: Seconds = 2.0,
    sockets_only: Annotated[bool, typer.Option("--sockets-only", help="Do not share memory.")] = False,
    log: Annotated[
        str, typer.Option(help="What shards keep, as a job's durability.log; in the folder TMPDIR.")
    ] = "none",
    backups: Annotated[
        int, typer.Option(min=0, max=1, help="Of each shard: 1 lets the next one hold its journal too.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Time push + apply + pull between real shard and worker processes of this machine."""
    from paramserver.cli.bench import exchange
    from paramserver.cli.bench.report import median, show, spread

    ways = parse_ways(push, pull)
    rows: list[list[str]] = []
    facts: list[dict[str, object]] = []
    for elements in parse_sizes(sizes, "--sizes", least=shards):
        setting = exchange.Setting(
            elements, shards, workers, seconds, ways, {"name": optimizer}, not sockets_only, log, backups
        )
        rates = [_measured(lambda setting=setting: exchange.measure(setting)) for _ in range(rounds)]  # type: ignore[misc]
        gigabytes = [rate.gigabytes_per_second(elements) for rate in rates]
        used = [each for rate in rates if (each := rate.cpu_seconds_per_gigabyte(elements)) is not None]
        cycles = median(rate.cycles_per_second for rate in rates)
        rows.append([short_size(elements), spread(gigabytes), f"{cycles:.0f}", f"{median(used):.2f}" if used else "-"])
        facts.append(
            {"elements": elements, "gigabytes_per_second": gigabytes, "cycles_per_second": cycles,
             "cpu_seconds_per_gigabyte": used}
        )  # fmt: skip
    through = "sockets only" if sockets_only else "shared memory where it helps"
    show(
        f"{ways.label}, {optimizer}, log {log}, backups {backups}, {shards} shards x {workers} workers, {through}; "
        "GB of float32 pushed + pulled",
        ["parameters", "GB/s: median (range)", "cycles/s", "CPU s/GB"],
        rows,
        {"benchmark": "exchange", "push": ways.push, "pull": ways.pull, "optimizer": optimizer, "shards": shards,
         "workers": workers, "rounds": rounds, "sockets_only": sockets_only, "log": log, "backups": backups,
         "results": facts},
        as_json,
    )  # fmt: skip


@group.command("wire")
def bench_wire(
    sizes: Annotated[str, typer.Option(help="Bytes of a frame; 0 sends heads alone.")] = "0,4096,65536,1048576",
    in_flight: Annotated[str, typer.Option(help="Messages on their way at once.")] = "1,8",
    rounds: Rounds = 3,
    seconds: Seconds = 1.0,
    sockets_only: Annotated[bool, typer.Option("--sockets-only", help="Do not share memory.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time messages between two processes of this machine, through sockets and through shared memory."""
    from paramserver.cli.bench import wire
    from paramserver.cli.bench.report import median, show, spread
    from paramserver.protocol.transport import MAX_MESSAGE_BYTES

    largest = MAX_MESSAGE_BYTES - 4096  # what is left is for the head
    wanted = parse_sizes(sizes, "--sizes", least=0)
    if max(wanted) > largest:
        raise InputError(f"--sizes: found {max(wanted)}; a message takes a frame of at most {largest} bytes")
    depths = parse_sizes(in_flight, "--in-flight")
    if max(depths) > 64:
        raise InputError(f"--in-flight: found {max(depths)}; at most 64 messages may be on their way")
    rows: list[list[str]] = []
    facts: list[dict[str, object]] = []
    for frame_bytes in wanted:
        for depth in depths:
            for way in wire.MEMORY_WAYS[: 1 if sockets_only else None]:
                setting = wire.WireSetting(frame_bytes, depth, seconds, way == wire.MEMORY_WAYS[1])
                rates = [_measured(lambda setting=setting: wire.measure(setting)) for _ in range(rounds)]  # type: ignore[misc]
                trips = [rate.round_trips_per_second for rate in rates]
                gigabytes = median(rate.gigabytes_per_second(frame_bytes) for rate in rates)
                rows.append([str(frame_bytes), str(depth), way, spread(trips), f"{gigabytes:.2f}"])
                facts.append(
                    {"frame_bytes": frame_bytes, "in_flight": depth, "through": way,
                     "round_trips_per_second": trips, "gigabytes_per_second": gigabytes}
                )  # fmt: skip
    show(
        "two processes, a frame there and one of the same size back; GB there + back",
        ["frame bytes", "in flight", "through", "round trips/s: median (range)", "GB/s"],
        rows,
        {"benchmark": "wire", "rounds": rounds, "results": facts},
        as_json,
    )


def _measured(measure: Callable[[], T]) -> T:
    """A measurement whose failure ends the command with one message."""
    from paramserver.cli.bench.crew import MeasurementError

    try:
        return measure()
    except MeasurementError as error:
        raise FailedError(str(error)) from None


def add_to(app: typer.Typer) -> None:
    app.add_typer(group, name="bench")
