"""Exchange rate: push + apply + pull between real shard and worker processes, with synthetic gradients.

The shards run their own loop, the workers the library. In the coordinator's place is one that registers a
shard and then wants no heartbeats; the order is handed over as a coordinator would give it.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from paramserver.cli.bench.choices import Ways, synthetic_job
from paramserver.cli.bench.crew import START_SECONDS, Child, Crew, Line, MeasurementError, cpu_seconds, say_all
from paramserver.cli.errors import InputError

if TYPE_CHECKING:
    from paramserver.protocol.messages import Message, PartAddress, PartOrder, ShardReport
    from paramserver.protocol.transport import Listener, Received
    from worker.attached import Attached

LOOPBACK = "tcp://127.0.0.1:0"
MOMENTUM: Mapping[str, Any] = {"name": "momentum", "lr": 1e-3, "momentum": 0.9}
GRADIENT_SCALE = 1e-3
WARM_SHARE = 0.2  # of the timed part
NEVER_SECONDS = 1e6
MOST_SLOW = 20.0  # a timed part may take so many times its seconds: one cycle may be longer than all of it

REPORT = "report"
REPORTED = (  # of a shard's report: what only grows
    "updates",
    "bytes_in",
    "bytes_out",
    "journal_bytes",
    "record",
    "stored",
)
COUNTED = (
    *REPORTED,
    "waiting_seconds",
    "working_seconds",
    "push_payload_bytes",
    "push_elements",
    "pull_payload_bytes",
    "pull_snapshots",
    "pull_elements",
    "pull_snapshots",
)
PEAK = "megabytes_above_imports"
IN_STEP = "is_in_step"
INCARNATION = 1  # of every shard
LOOK_SECONDS = 0.05

Shapes = Mapping[str, tuple[int, ...]]  # of the parameters, by name, in layout order


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    elements: int
    shards: int
    workers: int
    seconds: float
    ways: Ways
    optimizer: Mapping[str, Any] = field(default_factory=lambda: dict(MOMENTUM))
    is_memory_shared: bool = True
    log: str = "none"  # durability.log of the job
    backups: int = 0  # of each shard; 1: the next one holds all that it acknowledges

    @property
    def shapes(self) -> Shapes:
        """One equal part a shard, so that every server has the same to do; a matrix, since vectors stay in fp32."""
        return {f"part{shard}": (1, self.elements // self.shards) for shard in range(self.shards)}


@dataclass(frozen=True)
class Rate:
    """What was measured, over the timed part of all workers."""

    cycles: int
    by_client: tuple[float, ...]  # cycles a second of each worker
    cpu_seconds: float | None  # user and system, of all processes; None where the system does not tell
    shards: tuple[Mapping[str, float], ...] = ()  # what each counted meanwhile, and its memory's peak
    clients: tuple[Mapping[str, float], ...] = ()  # what each one's watch saw

    @property
    def cycles_per_second(self) -> float:
        """Of all workers together."""
        return sum(self.by_client)

    def gigabytes_per_second(self, elements: int) -> float:
        """Float32 parameters pushed + pulled, whatever is on the wire."""
        return self.cycles_per_second * elements * 8 / 1e9

    def cpu_seconds_per_gigabyte(self, elements: int) -> float | None:
        return None if self.cpu_seconds is None else self.cpu_seconds / (self.cycles * elements * 8 / 1e9)


def measure(setting: Setting) -> Rate:
    """Start shards and workers, let every worker cycle for so many seconds, and end them.

    Raises InputError for encodings that a job may not have, MeasurementError where a process fails.
    """
    if setting.backups and (setting.log == "none" or setting.shards < 2):
        raise InputError(
            f"--backups 1: found --log {setting.log} and --shards {setting.shards}; a backup keeps another shard's "
            "journal: use --log journal and at least 2 shards"
        )
    if find_spec("torch") is None:
        raise MeasurementError("workers need torch, which is not installed: pip install 'paramserver[models]'")
    job = synthetic_job(setting.ways, setting.optimizer, setting.log)
    # The journals lie where temporary files do: TMPDIR says which disk is measured.
    with (
        TemporaryDirectory(prefix="paramserver-bench-") as state,
        Crew(shared_memory(setting.is_memory_shared)) as crew,
    ):
        servers, addresses = start_shards(
            crew, setting.shapes, setting.shards, job.json_text(), state=state, has_backups=setting.backups > 0
        )
        clients = [
            crew.start(f"worker-{n}", cycling_worker, n, addresses, setting.shapes, dict(setting.ways.push))
            for n in range(setting.workers)
        ]
        rate = run_cycles(crew, clients, setting.seconds, servers)
        crew.join(clients)  # they flush what their encodings hold back
        crew.end(servers)
    return rate


def shared_memory(is_on: bool) -> dict[str, str]:
    """The environment of processes that may, or may not, send frames through shared memory."""
    return {"PARAMSERVER_SHARED_MEMORY": "on" if is_on else "off"}


# --------------------------------------------------------------------- the shards


def start_shards(
    crew: Crew,
    shapes: Shapes,
    count: int,
    specification: str,
    listen: str = LOOPBACK,
    start: Callable[..., Child] = Crew.start,
    state: str = "",
    has_backups: bool = False,
) -> tuple[list[Child], list[PartAddress]]:
    """Shard processes that serve a model of these parameters, blocks balanced by bytes, and where they are.

    `start` may start them elsewhere; it is called like Crew.start. `state` is a folder for the journals of a
    specification that wants them. `has_backups`: each shard is the backup of the one before it, in a ring.
    """
    from paramserver.coordinator.placement import balance
    from paramserver.protocol.messages import PartAddress

    placed = balance(layout_of(shapes), [f"shard-{number:03d}" for number in range(count)], count)
    servers = [
        start(crew, name, serve_shard, name, shapes, blocks, specification, listen, state, has_backups)
        for name, blocks in placed.items()
    ]
    addresses = crew.hear(servers, "to listen")
    if has_backups:
        say_all(servers, list(zip(placed, placed.values(), addresses, strict=True)))
        wait_in_step(crew, servers)
    return servers, [
        PartAddress(name, address, blocks) for (name, blocks), address in zip(placed.items(), addresses, strict=True)
    ]


def wait_in_step(crew: Crew, servers: Sequence[Child]) -> None:
    """Wait until every shard's backup has all that the shard has. Raises MeasurementError."""
    deadline = time.monotonic() + START_SECONDS
    while not all(report[IN_STEP] for report in ask_reports(crew, servers)):
        if time.monotonic() > deadline:
            raise MeasurementError(f"waited {START_SECONDS:.0f} s in vain for the backups to be in step")
        time.sleep(LOOK_SECONDS)


def layout_of(shapes: Shapes) -> Any:
    from paramserver.protocol.layout import Parameter, cut_layout

    return cut_layout([Parameter(name, shape, "all") for name, shape in shapes.items()])


def serve_shard(
    line: Line,
    name: str,
    shapes: Shapes,
    blocks: tuple[int, ...],
    specification: str,
    listen: str,
    state: str = "",
    has_backup: bool = False,
) -> None:
    """A shard process: says its address, then its report as often as it hears REPORT, until it hears anything else.

    `has_backup`: it first hears (name, blocks, address) of all shards, of which the next one backs it up.
    """
    from threading import Thread

    from paramserver.job import Job
    from paramserver.process import StopRequest, identify
    from paramserver.protocol.messages import PartOrder, Register
    from paramserver.protocol.zeromq import ZeroMQTransport
    from paramserver.shard.core import ShardCore
    from paramserver.shard.journal.home import JournalHome
    from paramserver.shard.server import ShardServer
    from paramserver.shard.serving import prepare

    identify("shard", name)
    job = Job.model_validate_json(specification)
    prepare(job)  # compiled kernels count as imports
    imported = _peak_megabytes()
    core, journal = ShardCore(name), None
    layout = layout_of(shapes)
    order = PartOrder(
        part=name, job="bench", specification=specification, term=1, phase=0, layout=layout, blocks=blocks
    )
    if job.durability.log != "none":
        serving, journal = JournalHome(Path(state), name).open(order)
        core.adopt(serving)
    core.take_order(order)
    stop = StopRequest()
    # One a thread. Where `listen` is beyond loopback it is in network namespaces that nobody else is in.
    transport, others = ZeroMQTransport(is_insecure=True), ZeroMQTransport()
    coordinator = ReportReader(others.listen(LOOPBACK))
    introduction = Register(role="shard", name=name, pid=os.getpid())
    home = None if job.durability.log == "none" else JournalHome(Path(state), name)
    server = ShardServer(transport, listen, coordinator.address, introduction, home)
    server.hold(core, journal)
    line.say(server.address)
    if has_backup:
        server.follow(_ring_orders(order, line.hear()))

    def answer() -> None:
        coordinator.begin()
        while line.hear() == REPORT:
            line.say(_figures(coordinator.read(), imported))
        stop.set("the measurement is over")

    answering = Thread(target=answer, daemon=True)
    answering.start()
    server.run(stop)
    answering.join()
    transport.close()
    others.close()


class ReportReader:
    """In a coordinator's place: a shard's reports when they are wanted, made by its own thread as always.

    A shard beats as soon as it is told that it is registered, and by these words not again for very long.
    """

    def __init__(self, listener: Listener) -> None:
        self.address = listener.address
        self._listener = listener
        self._peer = b""

    def begin(self) -> None:
        """Answer the shard's first words. Raises MeasurementError where it says none."""
        from paramserver.protocol.messages import Register

        self._peer = self._await(Register).peer
        self.read()

    def read(self) -> ShardReport:
        """A report of now. Raises MeasurementError where the shard falls silent."""
        from paramserver.protocol.messages import Heartbeat, Registered, ShardReport

        while self._listener.receive(0) is not None:
            pass  # it also beats when something has changed: those are reports of then
        never = Registered(incarnation=INCARNATION, heartbeat_seconds=NEVER_SECONDS, session_seconds=NEVER_SECONDS)
        self._listener.send(self._peer, never)
        beat = self._await(Heartbeat).message
        assert isinstance(beat, Heartbeat)
        assert isinstance(beat.report, ShardReport)
        return beat.report

    def _await(self, kind: type[Message]) -> Received:
        from paramserver.protocol.transport import Received

        while isinstance(received := self._listener.receive(START_SECONDS), Received):
            if isinstance(received.message, kind):
                return received
        raise MeasurementError(f"a shard has said nothing for {START_SECONDS:.0f} s")


def _ring_orders(own: PartOrder, ring: Sequence[tuple[str, tuple[int, ...], str]]) -> tuple[PartOrder, PartOrder]:
    """The orders of a shard that the next one of the ring backs up, and which backs up the one before it."""
    from msgspec import structs

    from paramserver.protocol.messages import Partner

    place = [name for name, _, _ in ring].index(own.part)
    (before, blocks, before_at), (after, _, after_at) = ring[place - 1], ring[(place + 1) % len(ring)]
    backup = structs.replace(
        own, part=before, blocks=blocks, role="backup", partner=Partner(before, INCARNATION, before_at)
    )
    return structs.replace(own, partner=Partner(after, INCARNATION, after_at)), backup


def _figures(whole: ShardReport, imported_megabytes: float) -> dict[str, float]:
    report = next(report for report in whole.parts if report.role == "primary")
    counted = {name: float(getattr(report, name)) for name in REPORTED}
    counted |= {"waiting_seconds": whole.waiting_seconds, "working_seconds": whole.working_seconds}
    for way in ("push", "pull"):
        own = [row for row in report.traffic if row.way == way]
        counted[f"{way}_payload_bytes"] = float(sum(row.payload_bytes for row in own))
        counted[f"{way}_elements"] = float(sum(row.elements for row in own))
    counted["pull_snapshots"] = float(sum(row.snapshots for row in report.traffic))
    counted[IN_STEP] = float(report.is_synced)
    return {**counted, PEAK: _peak_megabytes() - imported_megabytes}


def _peak_megabytes() -> float:
    try:
        # Not getrusage: on Linux its peak begins with that of the parent, which a spawned process never had.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return float(status.partition("VmHWM:")[2].split()[0]) / 1024
    except OSError:
        kilobyte = 1024 if sys.platform == "darwin" else 1  # macOS tells bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / kilobyte / 1024


# --------------------------------------------------------------------- the workers


def cycling_worker(
    line: Line, number: int, addresses: Sequence[PartAddress], shapes: Shapes, push: Mapping[str, Any]
) -> None:
    """A worker process that pushes the same gradients and pulls, as often as it can; see `run_cycles`."""
    with attach_synthetic(number, addresses, shapes, push) as (attached, gradients):
        if number == 0:
            attached.initialise()
        follow_cycles(line, lambda: attached.push(gradients), before=attached.pull)


@contextmanager
def attach_synthetic(
    number: int, addresses: Sequence[PartAddress], shapes: Shapes, push: Mapping[str, Any]
) -> Iterator[tuple[Attached, Mapping[str, Any]]]:
    """A model of zeros, attached as worker `number`, and seeded gradients (name -> tensor) for it.

    `push` is the job's section of that name; what it would do for a new model is left out. Torch computes with one
    thread.
    """
    import numpy as np
    import torch

    from models.task import Parameter
    from paramserver.job import PushSettings
    from worker.attached import attach

    torch.set_num_threads(1)
    generator = np.random.default_rng(number)
    parameters = [Parameter(name, torch.zeros(shape), "all") for name, shape in shapes.items()]
    gradients = {
        name: torch.from_numpy(generator.normal(0, GRADIENT_SCALE, shape).astype(np.float32))
        for name, shape in shapes.items()
    }
    settings = PushSettings.model_validate(push)
    if "settling_updates" not in push:
        settings = settings.model_copy(update={"settling_updates": 0})  # a measured step is one of a settled job
    with attach(
        parameters,
        addresses,
        job="bench",
        worker=f"worker-{number}",
        push=settings,
    ) as attached:
        yield attached, gradients


# --------------------------------------------------------------------- timing


def run_cycles(crew: Crew, clients: Sequence[Child], seconds: float, servers: Sequence[Child] = ()) -> Rate:
    """Lead clients that run `follow_cycles` through warm-up and timed part, all at once."""
    longest = START_SECONDS + MOST_SLOW * seconds
    crew.hear(clients, "to be ready")
    say_all(clients, WARM_SHARE * seconds)
    crew.hear(clients, "its warm-up", longest)
    before, used = ask_reports(crew, servers), cpu_seconds(crew.children)
    say_all(clients, seconds)
    found = crew.hear(clients, "its cycles", longest)
    used_at_end, after = cpu_seconds(crew.children), ask_reports(crew, servers)
    say_all(clients)
    return Rate(
        cycles=sum(count for count, _, _ in found),
        by_client=tuple(count / elapsed for count, elapsed, _ in found),
        cpu_seconds=None if used is None or used_at_end is None else used_at_end - used,
        shards=tuple(
            {name: value if name == PEAK else value - old[name] for name, value in new.items()}
            for old, new in zip(before, after, strict=True)
        ),
        clients=tuple(facts for _, _, facts in found),
    )


def ask_reports(crew: Crew, servers: Sequence[Child]) -> list[dict[str, float]]:
    """What shards have counted so far."""
    say_all(servers, REPORT)
    return crew.hear(servers, "its report")


class Watch(Protocol):
    """Looks at what happens during the timed part of one client."""

    def begin(self) -> None: ...

    def end(self) -> dict[str, float]: ...


class Unwatched:
    def begin(self) -> None:
        pass

    def end(self) -> dict[str, float]:
        return {}


def follow_cycles(
    line: Line,
    cycle: Callable[[], object],
    before: Callable[[], object] | None = None,
    watch: Watch | None = None,
) -> None:
    """A client's side: ready, warm-up, timed part; returns when all clients have done theirs."""
    watch = watch or Unwatched()
    line.say(None)
    warm_seconds = line.hear()
    if before is not None:
        before()  # first values are there: the one that gives them is ready
    timed_cycles(cycle, warm_seconds)
    line.say(None)
    seconds = line.hear()
    watch.begin()
    count, elapsed = timed_cycles(cycle, seconds)
    line.say((count, elapsed, watch.end()))
    line.hear()


def timed_cycles(cycle: Callable[[], object], seconds: float) -> tuple[int, float]:
    """(cycles, seconds) of as many as begin within so many seconds, at least one."""
    started, count = time.perf_counter(), 0
    while True:
        cycle()
        count += 1
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return count, elapsed
