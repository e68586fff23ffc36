"""How many updates a second one shard takes from one worker, and where its time goes.

Updates alone: the worker keeps PIPELINE pushes on their way and pulls nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.options import make_parser, rounds_of, seconds_of
from benchmarks.report import median, show, spread
from paramserver.cli.bench.choices import Ways, parse_sizes, synthetic_job
from paramserver.cli.bench.crew import Crew
from paramserver.cli.bench.exchange import ask_reports, layout_of, start_shards

PIPELINE = 8  # pushes on their way; a shard handles one at a time
PARAMETERS = 100_000


def run(rounds: int, seconds: float, elements: int = PARAMETERS) -> None:
    """Print the table of rates."""
    rows, facts = [], []
    for optimizer in ("sgd", "adagrad", "adam"):
        for encoding in ("fp32", "int8"):
            results = [push_only(elements, encoding, optimizer, seconds) for _ in range(rounds)]
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


def push_only(elements: int, encoding: str, optimizer: str, seconds: float) -> dict[str, float]:
    """Updates a second, and the share of its time that the shard waited."""
    from paramserver.encoding import make_encoding
    from paramserver.protocol.messages import BlockUpdate, Hello, Initialise, Initialised, Push, Pushed, Welcome
    from paramserver.protocol.transport import Received
    from paramserver.protocol.zeromq import ZeroMQTransport

    job = synthetic_job(Ways({"encoding": encoding}, {"encoding": "fp32"}), {"name": optimizer})
    shapes = {"part0": (1, elements)}
    with Crew() as crew:
        servers, (placed,) = start_shards(crew, shapes, 1, job.json_text())
        layout, transport = layout_of(shapes), ZeroMQTransport()
        channel = transport.connect(placed.address)

        def answer(kind: type) -> Any:
            received = channel.receive(30)
            if not isinstance(received, Received) or not isinstance(received.message, kind):
                raise RuntimeError(f"expected {kind.__name__} from the shard, got {received}")
            return received.message

        coder = make_encoding(encoding)
        frame = np.empty(coder.frame_bytes(elements), np.uint8)
        values = np.random.default_rng(0).normal(0, 1e-3, elements).astype(np.float32)
        coder.encode(values, frame, np.zeros(elements, np.float32))
        identity: dict[str, Any] = {"job": "bench", "worker": "worker-0", "incarnation": 1}
        channel.send(Hello(**identity, layout=layout.fingerprint, part=placed.part))
        answer(Welcome)
        first = Initialise(request=0, job="bench", term=1, layout=layout.fingerprint, blocks=(0,))
        channel.send(first, [np.zeros(elements, np.float32).data])
        answer(Initialised)

        def push(sequence: int) -> None:
            edition = sequence - 1 if sequence <= PIPELINE else sequence - PIPELINE
            update = BlockUpdate(0, sequence, edition, coder.identifier)
            channel.send(Push(request=sequence, term=1, step=sequence, updates=(update,), **identity), [frame.data])

        for sent in range(1, PIPELINE + 1):
            push(sent)
        (before,) = ask_reports(crew, servers)
        started, applied = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            if answer(Pushed).refused:
                raise RuntimeError("the shard refused an update of the benchmark")
            applied += 1
            push(PIPELINE + applied)
        elapsed = time.perf_counter() - started
        (after,) = ask_reports(crew, servers)
        for _ in range(PIPELINE):
            answer(Pushed)
        channel.close()
        transport.close()
        crew.end(servers)
    waiting, working = (after[name] - before[name] for name in ("waiting_seconds", "working_seconds"))
    return {"updates_per_second": applied / elapsed, "waiting_share": waiting / (waiting + working)}


def main(arguments: Sequence[str]) -> None:
    parser = make_parser("apply", __doc__, seconds=2.0)
    parser.add_argument("--parameters", default="100k", help="of the one block (default %(default)s)")
    given = parser.parse_args(arguments)
    run(rounds_of(given), seconds_of(given), parse_sizes(given.parameters, "--parameters")[0])
