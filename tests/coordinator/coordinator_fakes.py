"""A cluster of scripted processes around the coordinator's core, on an injected clock.

Processes use the real membership; what they compute is made up. Facts go through a real store, so that a
restart is what it is in life: a new core on what a killed one had committed.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from paramserver.coordinator.core import CoordinatorCore
from paramserver.coordinator.effects import AppendMetrics, Effect, SealModel, Send, StorePart, WriteResult
from paramserver.coordinator.store import Store
from paramserver.protocol.layout import Layout, Parameter, cut_layout
from paramserver.protocol.membership import Membership
from paramserver.protocol.messages import (
    ExportPart,
    ExportStored,
    Lease,
    LeaseDone,
    Message,
    Orders,
    PartOrder,
    PartReport,
    Register,
    ShardOrder,
    ShardReport,
    StalenessRow,
    WorkerOrder,
    WorkerReport,
)

LAYOUT: Layout = cut_layout([Parameter("a", (30,), "one"), Parameter("b", (20,), "two"), Parameter("c", (10,), "two")])
EXAMPLES = {"train": 40, "valid": 6, "test": 3}
MODEL = bytes(range(100))


def specification(**settings: Any) -> str:
    job = {
        "name": "job",
        "model": {"family": "recurrent", "args": {"task": "char-lm"}},
        "data": {"batch": 4},
        "cluster": {"shards": 2, "workers": 2},
        **settings,
    }
    return json.dumps(job)


Partnership = tuple[str, int, int]  # shard, incarnation and number


class FakeShard:
    """Becomes what its orders say. First values of blocks come from a worker, or from its journal.

    `disk` is what survives it: by part, the updates in the order in which they were applied. A primary copies its log
    to its backup, says then that it is in step, and acknowledges from then on only what the backup has stored too.
    """

    role = "shard"

    def __init__(
        self,
        name: str,
        pid: int,
        port: int = 1,
        journal: set[int] | None = None,
        disk: dict[str, list[int]] | None = None,
    ) -> None:
        self.name = name
        self.journal = journal or set()
        self.disk = {} if disk is None else disk
        self.failed = ""
        self.is_stopped = False
        self.is_told_to_end = False
        self.address = f"tcp://{name}:{port}"
        introduction = Register(role="shard", name=name, address=self.address, pid=pid, host="fake")
        self.membership = Membership(introduction, self.report)
        self.orders: dict[str, PartOrder] = {}
        self.initialised: set[int] = set()
        self.waits_for: dict[str, Partnership] = {}  # part -> the backup that is in step
        self.job = ""
        self.bytes_in = 0
        self.has_forgotten: set[str] = set()  # parts whose records are gone from its disk

    @property
    def order(self) -> PartOrder | None:
        """Of its own part, or of another one that it holds."""
        return self.orders.get(self.name) or next(iter(self.orders.values()), None)

    def report(self) -> ShardReport:
        if self.failed:
            return ShardReport((PartReport(self.name, "job", failed=self.failed),))
        return ShardReport(tuple([self._report(order) for order in self.orders.values()]))

    def _report(self, order: PartOrder) -> PartReport:
        # The first record of a journal is the order itself.
        record = 0 if order.part in self.has_forgotten else 1 + len(self.disk.get(order.part, []))
        return PartReport(
            part=order.part,
            job=order.job,
            term=order.term,
            role=order.role,
            blocks=len(order.blocks),
            initialised_blocks=len(self.initialised & set(order.blocks)),
            updates=7,
            bytes_in=self.bytes_in,
            staleness=(StalenessRow("worker-0", "one", (3, 4), 4),),
            record=record,
            stored=record if order.part in self.waits_for else 0,
            is_synced=order.part in self.waits_for,
            partner="" if order.partner is None else order.partner.shard,
            partner_incarnation=0 if order.partner is None else order.partner.incarnation,
            partner_number=0 if order.partner is None else order.partner.number,
        )

    def obey(self, message: Message, now: float) -> None:
        orders = self.membership.hear(message, now)
        if orders is None:
            return
        self.is_told_to_end = orders.shutdown
        assert orders.order is None or isinstance(orders.order, ShardOrder)
        parts = orders.order.parts if orders.order else ()
        job = parts[0].job if parts else ""
        if job != self.job:
            self.initialised = set(self.journal)
            self.job = job
        self.orders = {part.part: self._follow(part) for part in parts}
        self.waits_for = {part: backup for part, backup in self.waits_for.items() if part in self.orders}

    def _follow(self, order: PartOrder) -> PartOrder:
        before = self.orders.get(order.part)
        if before is not None and before.job == order.job:
            assert order.term >= before.term, "a term went back"
        if order.role == "backup" and (before is None or before.role == "primary" or _who(before) != _who(order)):
            # What it holds may be of another past.
            self.disk.pop(order.part, None)
            self.initialised -= set(order.blocks)
        if order.role == "backup" or (before is not None and before.term != order.term):
            self.waits_for.pop(order.part, None)
        if self.waits_for.get(order.part) != _who(order):
            self.waits_for.pop(order.part, None)
        return order

    def work(self, cluster: Cluster) -> list[Message]:
        for order in self.orders.values():
            backup = self._backup(cluster, order)
            if order.role == "primary" and backup is not None and order.partner is not None:
                self._replicate(order, backup)
                if order.part not in self.waits_for:
                    self.waits_for[order.part] = order.partner.shard, order.partner.incarnation, order.partner.number
                    self.membership.beat_soon()
        return []

    def _replicate(self, order: PartOrder, backup: FakeShard) -> None:
        backup.disk[order.part] = list(self.disk.get(order.part, []))
        backup.initialised |= self.initialised & set(order.blocks)

    def _backup(self, cluster: Cluster, order: PartOrder) -> FakeShard | None:
        """The process that stores this part's records for us; None where it is not there, or has another order."""
        other = cluster.processes.get(order.partner.shard) if order.partner is not None else None
        if not isinstance(other, FakeShard) or other.is_stopped or order.partner is None:
            return None
        if frozenset((self.name, other.name)) in cluster.cut:
            return None
        theirs = other.orders.get(order.part)
        if other.membership.incarnation != order.partner.incarnation or theirs is None:
            return None
        is_ours = theirs.role == "backup" and _who(theirs) == (
            self.name,
            self.membership.incarnation,
            order.partner.number,
        )
        return other if is_ours and theirs.term == order.term else None

    def push(self, cluster: Cluster, part: str, term: int, update: int) -> bool:
        """Apply an update of a worker at most once; whether it is acknowledged."""
        order = self.orders.get(part)
        if self.is_stopped or order is None or order.role != "primary" or order.term != term:
            return False
        log = self.disk.setdefault(part, [])
        if update not in log:
            log.append(update)
        if part not in self.waits_for:
            return True
        backup = self._backup(cluster, order)
        if backup is None:
            return False
        self._replicate(order, backup)
        return True


def _who(order: PartOrder) -> Partnership | None:
    partner = order.partner
    return None if partner is None else (partner.shard, partner.incarnation, partner.number)


class FakeWorker:
    """Finishes one lease a round, the oldest that it holds, which is begun. `is_stuck` keeps it from working,
    not from beating.
    """

    role = "worker"

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.membership = Membership(Register(role="worker", name=name, pid=pid, host="fake"), self.report)
        self.is_stuck = False
        self.is_stopped = False
        self.is_told_to_end = False
        self.layout, self.examples, self.loss_sum, self.model = LAYOUT, EXAMPLES, 8.0, MODEL
        self.log: list[Lease] = []
        self.failed = ""
        self._forget()

    def _forget(self) -> None:
        self.order: WorkerOrder | None = None
        self.held: dict[int, Lease] = {}
        self.returned: set[int] = set()
        self.done: dict[int, LeaseDone] = {}
        self.drained = False
        self.stored = 0

    @property
    def begun(self) -> tuple[int, ...]:
        return tuple(self.held)[:1]

    def report(self) -> WorkerReport:
        if self.order is None:
            return WorkerReport()
        declares = self.order.stage == "initialise" and not self.order.placement
        return WorkerReport(
            job=self.order.job,
            stage=self.order.stage,
            layout=self.layout if declares else None,
            examples=self.examples if declares else {},
            held=tuple(self.held),
            returned=tuple(self.returned),
            done=tuple(self.done.values()),
            drained=self.drained,
            failed=self.failed,
            steps=2 * len([lease for lease in self.log if lease.kind == "train"]),
            loss=2.0,
            begun=self.begun,
            metrics={"accuracy": 0.5} if self.log else {},
        )

    def obey(self, message: Message, now: float) -> None:
        if isinstance(message, ExportStored):
            self.stored = message.stored
        orders = self.membership.hear(message, now)
        if orders is None:
            return
        self.is_told_to_end = orders.shutdown
        self._take(orders)

    def _take(self, orders: Orders) -> None:
        order = orders.order
        assert order is None or isinstance(order, WorkerOrder)
        if order is None or (self.order is not None and order.job != self.order.job):
            self._forget()
        if order is None:
            return
        self.order = order
        for number in orders.confirmed:
            self.done.pop(number, None)
            if number not in self.begun:
                self.held.pop(number, None)
        self.returned &= {lease.number for lease in order.grants}
        for lease in order.grants:
            if lease.number not in {*self.held, *self.done, *self.returned}:
                self.held[lease.number] = lease
        while len(self.held) > order.hold:
            self.returned.add(self.held.popitem()[0])

    def work(self, cluster: Cluster) -> list[Message]:
        if self.order is None or self.is_stuck:
            return []
        if self.order.stage == "drain":
            self.drained = True
        for number, lease in list(self.held.items()):
            if lease.kind == "initialise":
                if not self.order.placement:
                    continue
                for part in self.order.placement:
                    cluster.shard_at(part.address).initialised.update(part.blocks)
            if lease.kind == "export":
                piece = ExportPart(
                    name=self.name,
                    incarnation=self.membership.incarnation,
                    job=self.order.job,
                    lease=number,
                    offset=self.stored,
                    total=len(self.model),
                )
                return [piece]
            self.log.append(lease)
            del self.held[number]
            steps = 2 if lease.kind == "train" else 0
            examples = len(lease.examples)
            self.done[number] = LeaseDone(
                number,
                steps=steps,
                elements=4 * examples,
                loss_sum=self.loss_sum * examples,
                metrics={"accuracy": 3.0 * examples},
            )
            self.membership.beat_soon()
            break
        return []


class Cluster:
    """The core, its store, and the processes; `run` lets time pass."""

    def __init__(self, folder: Path, shards: int = 2, workers: int = 2) -> None:
        self.folder = folder
        self.now = 100.0
        self.store = Store(folder / "state-1")
        self.core = CoordinatorCore(self.now, self.store.load())
        self.processes: dict[str, FakeShard | FakeWorker] = {}
        self.peers: dict[bytes, FakeShard | FakeWorker] = {}
        self.cut: set[frozenset[str]] = set()  # pairs of shards that cannot reach each other
        self.is_coordinator_up = True
        self.restarts = 1
        self.model = bytearray()
        self.sealed: list[str] = []
        self.written: dict[str, Any] = {}
        self.metrics: list[dict[str, Any]] = []
        self.sent: Counter[str] = Counter()
        self.members: set[tuple[str, ...]] = set()
        for i in range(shards):
            self.start(FakeShard(f"shard-{i}", pid=10 + i))
        for i in range(workers):
            self.start(FakeWorker(f"worker-{i}", pid=20 + i))

    def start(self, process: FakeShard | FakeWorker) -> None:
        self.processes[process.name] = process

    def kill(self, name: str) -> None:
        del self.processes[name]

    def shard(self, name: str) -> FakeShard:
        process = self.processes[name]
        assert isinstance(process, FakeShard)
        return process

    def shard_at(self, address: str) -> FakeShard:
        shards = [process for process in self.processes.values() if isinstance(process, FakeShard)]
        return next(shard for shard in shards if shard.address == address)

    def worker(self, name: str) -> FakeWorker:
        process = self.processes[name]
        assert isinstance(process, FakeWorker)
        return process

    def workers(self) -> list[FakeWorker]:
        return [process for process in self.processes.values() if isinstance(process, FakeWorker)]

    def submit(self, text: str | None = None, name: str = "job") -> str:
        job_id = self.core.unused_id(name, lambda candidate: False)
        self.carry_out(self.core.submit(job_id, text or specification(), [], "today", self.now))
        return job_id

    def state(self, job_id: str = "job") -> str:
        return self.core.jobs[job_id].state

    def reason(self, job_id: str = "job") -> str:
        return self.core.jobs[job_id].reason

    def kill_coordinator(self) -> None:
        """As SIGKILL does: the store is not closed; what was committed is all that a successor finds."""
        self.is_coordinator_up = False
        self.restarts += 1
        shutil.copytree(self.folder / f"state-{self.restarts - 1}", self.folder / f"state-{self.restarts}")
        self.store.close()

    def restart_coordinator(self) -> None:
        self.store = Store(self.folder / f"state-{self.restarts}")
        self.core = CoordinatorCore(self.now, self.store.load())
        self.is_coordinator_up = True

    def carry_out(self, effects: list[Effect]) -> None:
        self.store.save(effects)
        for effect in effects:
            match effect:
                case Send():
                    self.sent[type(effect.message).__name__] += 1
                    process = self.peers.get(effect.peer)
                    if process is not None and self.processes.get(process.name) is not process:
                        process = None  # it is dead, and its successor has another connection
                    if process is not None and not process.is_stopped:
                        process.obey(effect.message, self.now)
                    if isinstance(effect.message, Orders) and isinstance(effect.message.order, ShardOrder):
                        for part in effect.message.order.parts:
                            if part.role == "primary":
                                self.members.add(tuple(member.worker for member in part.members))
                case StorePart():
                    if effect.offset == 0:
                        self.model.clear()
                    assert effect.offset == len(self.model)
                    self.model += effect.data
                case SealModel():
                    self.sealed.append(effect.job)
                case WriteResult():
                    self.written[effect.job] = effect.result
                case AppendMetrics():
                    self.metrics.append(dict(effect.figures))

    def deliver(self, process: FakeShard | FakeWorker, message: Message) -> None:
        peer = f"{process.name}/{id(process)}".encode()
        self.peers[peer] = process
        frames = []
        if isinstance(message, ExportPart) and isinstance(process, FakeWorker):
            frames = [memoryview(process.model)[message.offset : message.offset + 40]]
        if self.is_coordinator_up:
            self.carry_out(self.core.handle(peer, message, frames, self.now))

    def run(self, seconds: float, until: str | None = None, job_id: str = "job") -> None:
        """Let so much time pass, or less when the job comes to the state `until` (then it must)."""
        end = self.now + seconds
        while self.now < end:
            if until is not None and job_id in self.core.jobs and self.state(job_id) == until:
                return
            self.now += 0.1
            for process in [one for one in self.processes.values() if not one.is_stopped]:
                for message in process.work(self):
                    self.deliver(process, message)
                if (message := process.membership.due(self.now)) is not None:
                    self.deliver(process, message)
            if self.is_coordinator_up:
                self.carry_out(self.core.tick(self.now))
        assert until is None or self.state(job_id) == until, f"{self.state(job_id)}: {self.reason(job_id)}"
