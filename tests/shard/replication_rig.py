"""Shard processes that back each other up, on a network and disks in memory, under a small coordinator.

Everything is decided by one seed. The shards run their own loop, one turn at a time; a process dies at a write, is
stopped and goes on, is cut off; orders come late. The coordinator is a model of the real one: what it decides is
written down (`Record`) before it is ordered. Workers are models too: they follow the placement that they were told
last, and send again what was not answered.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from journal_rig import LAYOUT, digest_of
from msgspec import structs

from paramserver.encoding import make_encoding, parse_encoding
from paramserver.protocol.memory import MemoryChannel, MemoryNetwork
from paramserver.protocol.messages import (
    BlockUpdate,
    Heartbeat,
    Hello,
    Initialise,
    Initialised,
    Member,
    Orders,
    Partner,
    PartOrder,
    PartReport,
    Pull,
    Pulled,
    Push,
    Pushed,
    Refusal,
    Register,
    Registered,
    ShardOrder,
    ShardReport,
    Want,
    Welcome,
)
from paramserver.protocol.transport import Received
from paramserver.shard.journal.keeper import ShardJournal, open_journal
from paramserver.shard.journal.memory import CrashError, MemoryFolder
from paramserver.shard.part import Part
from paramserver.shard.server import ShardServer
from paramserver.shard.serving import Serving

SHARDS = ("s0", "s1", "s2")
PARTS = {"s0": (0,), "s1": (1,)}  # blocks; named after the shard that had them first
WORKERS = ("w0", "w1")
BEAT_SECONDS, SESSION_SECONDS = 0.1, 0.6
LOOK_SECONDS = 0.0007
RETURN_SECONDS = 3.0  # after which a backup that came back with all serves in the place of a primary that did not
STEP_SECONDS = 0.05
COORDINATOR = "coordinator"
TRANSIENT = {"unknown-part", "unknown-worker", "wrong-term", "not-initialised", "wrong-job"}
RESEND_SECONDS = 0.3
CALM_STEPS = 400  # at most; the end needs no more than a few sessions


class Prepared:
    """As Preparation, at once: kernels are compiled, and what the folder holds is read in the loop."""

    def __init__(self, order: PartOrder, home: MemoryHome | None) -> None:
        self.order = order
        self._home = home
        self._opened: tuple[Serving, ShardJournal] | None = None

    def is_over(self) -> bool:
        if self._opened is None and self.order.role == "primary":
            assert self._home is not None
            self._opened = self._home.open(self.order)
        return True

    def take(self) -> tuple[Serving, ShardJournal] | None:
        return self._opened

    def take_folder(self) -> MemoryFolder:
        assert self._home is not None
        return self._home.hold(self.order)

    def abandon(self) -> None:
        pass


@dataclass
class MemoryHome:
    world: World
    shard: str

    def hold(self, order: PartOrder) -> MemoryFolder:
        return self.world.folder(self.shard, order.part)

    def open(self, order: PartOrder) -> tuple[Serving, ShardJournal]:
        folder = self.hold(order)
        folder.capacity = None  # a disk that is full then fails the job, which is tested elsewhere
        opened = open_journal(folder, order, in_background=False)
        self.world.check_served(self.shard, order.part, opened[0], opened[1].number)
        return opened


class Process:
    """One life of a shard process."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.is_stopped_until = 0.0
        self.looks = 0  # at its clock, each of which takes a moment: a backup applies a few records in a turn
        self.channels: list[MemoryChannel] = []
        connect = world.net.connect
        made = self.channels

        class Transport:
            """The network, with every channel of this process written down: they die with it."""

            def __getattr__(self, name: str) -> Any:
                return getattr(world.net, name)

            def connect(self, address: str, key: str = "") -> MemoryChannel:
                made.append(connect(address, key))
                return made[-1]

        self.server = ShardServer(
            Transport(), f"{name}:0", COORDINATOR, Register(role="shard", name=name), MemoryHome(world, name),
            clock=self.clock, prepare=Prepared, in_background=False,
        )  # fmt: skip

    def clock(self) -> float:
        self.looks += 1
        return self.world.net.now + self.looks * LOOK_SECONDS

    @property
    def incarnation(self) -> int:
        return self.server._membership.incarnation

    def die(self) -> None:
        """What is on its way still arrives; nothing else leaves."""
        self.server._listener.close()
        for channel in self.channels:
            channel.close()


@dataclass
class Record:
    """What the coordinator has written down of a part."""

    primary: tuple[str, int]
    backup: tuple[str, int] | None = None
    is_synced: bool = False
    number: int = 0  # of the partnership with that backup
    term: int = 1
    gone_since: float | None = None  # since when the primary is missed


@dataclass
class Session:
    incarnation: int
    address: str
    peer: bytes
    heard_at: float


class Coordinator:
    """Levels only: every heartbeat is answered with what the process should be."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.listener = world.net.listen(COORDINATOR)
        self.sessions: dict[str, Session] = {}
        self.addresses: dict[tuple[str, int], str] = {}
        self.last_incarnation = dict.fromkeys(SHARDS, 0)
        self.records: dict[str, Record] = {}
        self.members = WORKERS
        self.number = 0
        self.deaf_until = dict.fromkeys(SHARDS, 0.0)
        self.promotions = self.grants = self.handovers = 0
        self.terms: dict[str, dict[int, tuple[str, int]]] = {part: {} for part in PARTS}

    def turn(self) -> None:
        while isinstance(received := self.listener.receive(0), Received):
            message = received.message
            name = message.name
            if self.world.net.now < self.deaf_until[name]:
                continue
            if isinstance(message, Register):
                self.register(received.peer, message)
            elif isinstance(message, Heartbeat):
                self.heartbeat(received.peer, message)
        now = self.world.net.now
        for name, session in list(self.sessions.items()):
            if now - session.heard_at > SESSION_SECONDS:
                self.end(name)
        for record in self.records.values():
            self.look_after(record)
        self.check_terms()

    def register(self, peer: bytes, message: Register) -> None:
        session = self.sessions.get(message.name)
        last = self.last_incarnation[message.name]
        # The network may have said it twice: what has the address already is the same process.
        is_known = self.addresses.get((message.name, last)) == message.address
        incarnation = message.incarnation or (last if is_known else 0)
        if not incarnation:
            if session is not None:
                self.end(message.name)
            self.last_incarnation[message.name] += 1
            incarnation = self.last_incarnation[message.name]
        elif incarnation < self.last_incarnation[message.name]:
            return
        self.sessions[message.name] = Session(incarnation, message.address, peer, self.world.net.now)
        self.addresses[message.name, incarnation] = message.address
        answer = Registered(incarnation=incarnation, heartbeat_seconds=BEAT_SECONDS, session_seconds=SESSION_SECONDS)
        self.listener.send(peer, answer)
        for record in self.records.values():
            # A primary that comes back has its journal; whoever was in step with another life of it is not any more.
            if record.primary[0] == message.name and record.primary[1] < incarnation:
                record.primary = message.name, incarnation
                record.backup, record.is_synced, record.gone_since = None, False, None

    def heartbeat(self, peer: bytes, message: Heartbeat) -> None:
        session = self.sessions.get(message.name)
        if session is None or session.incarnation != message.incarnation:
            self.listener.send(peer, Refusal(code="unknown-session", detail="register again"))
            return
        session.heard_at, session.peer = self.world.net.now, peer
        assert isinstance(message.report, ShardReport)
        for report in message.report.parts:
            assert not report.failed, report.failed
            self.take(message.name, session.incarnation, report)
        self.order(message.name)

    def take(self, name: str, incarnation: int, report: PartReport) -> None:
        record = self.records.get(report.part)
        if record is None or record.primary != (name, incarnation) or report.role != "primary":
            return
        backup = report.partner, report.partner_incarnation
        if report.term == record.term and record.backup == backup and record.number == report.partner_number:
            record.is_synced = record.is_synced or report.is_synced

    def order(self, name: str) -> None:
        session = self.sessions[name]
        me = name, session.incarnation
        orders = []
        for part, record in self.records.items():
            if record.primary == me:
                partner = None if record.backup is None else self.partner(record.backup, record)
                orders.append(self.world.part_order(part, record.term, self.members, "primary", partner))
            elif record.backup == me:
                partner = self.partner(record.primary, record)
                orders.append(self.world.part_order(part, record.term, self.members, "backup", partner))
        self.number += 1
        self.listener.send(session.peer, Orders(number=self.number, order=ShardOrder(tuple(orders))))

    def partner(self, who: tuple[str, int], record: Record) -> Partner:
        return Partner(who[0], who[1], self.addresses[who], is_synced=record.is_synced, number=record.number)

    def is_live(self, who: tuple[str, int] | None) -> bool:
        session = None if who is None else self.sessions.get(who[0])
        return who is not None and session is not None and session.incarnation == who[1]

    def end(self, name: str) -> None:
        del self.sessions[name]

    def look_after(self, record: Record) -> None:
        now = self.world.net.now
        if not self.is_live(record.primary):
            record.gone_since = now if record.gone_since is None else record.gone_since
            if record.is_synced and self.is_live(record.backup):
                self.promote(record, record.backup)
            elif record.is_synced and now - record.gone_since > RETURN_SECONDS:
                # Both are gone: the one that comes back first has all that was acknowledged.
                again = self.sessions.get(record.backup[0]) if record.backup is not None else None
                if again is not None:
                    self.promote(record, (record.backup[0], again.incarnation))
            return
        record.gone_since = None
        if record.backup is not None and not self.is_live(record.backup):
            self.grants += record.is_synced
            record.backup, record.is_synced = None, False
        if record.backup is None:
            others = [name for name in self.sessions if name != record.primary[0]]
            if others and self.world.chance.random() < 0.3:
                name = self.world.chance.choice(others)
                record.backup, record.is_synced = (name, self.sessions[name].incarnation), False
                record.number += 1
        elif record.is_synced and self.world.is_faulty and self.world.chance.random() < 0.005:
            self.handovers += 1
            self.promote(record, record.backup)

    def promote(self, record: Record, who: tuple[str, int]) -> None:
        self.promotions += 1
        record.primary, record.backup, record.is_synced = who, None, False
        record.term += 1
        record.gone_since = None

    def check_terms(self) -> None:
        for part, record in self.records.items():
            known = self.terms[part]
            assert record.term >= max(known, default=0), f"the term of {part} went back"
            name, _ = known.setdefault(record.term, record.primary)
            assert name == record.primary[0], f"term {record.term} of {part} is that of {name} and {record.primary[0]}"


@dataclass
class Waiting:
    """A push without an answer."""

    push: Push
    frames: list[bytes]
    sent_at: float


class Link:
    """A worker's connection to one part."""

    def __init__(self, worker: Worker, part: str) -> None:
        self.worker, self.part = worker, part
        self.address, self.term = "", 0
        self.channel: MemoryChannel | None = None
        self.is_welcome = False
        self.hello_at = -1.0
        self.waiting: dict[int, Waiting] = {}
        self.pulling = 0  # the request of a pull without an answer

    def follow(self, address: str, term: int) -> None:
        if term < self.term or (address, term) == (self.address, self.term):
            return
        if address != self.address:
            if self.channel is not None:
                self.channel.close()
            self.channel = self.worker.world.net.connect(address)
        self.address, self.term = address, term
        self.is_welcome = False

    def turn(self, now: float) -> None:
        if self.channel is None:
            return
        while isinstance(received := self.channel.receive(0), Received):
            self.hear(received)
        if not self.is_welcome:
            if now - self.hello_at > RESEND_SECONDS:
                self.hello_at = now
                worker = self.worker
                hello = Hello(
                    worker=worker.name, incarnation=worker.incarnation, job="job", layout=LAYOUT.fingerprint,
                    part=self.part,
                )  # fmt: skip
                self.channel.send(hello)
            return
        for waiting in self.waiting.values():
            if now - waiting.sent_at > RESEND_SECONDS:
                self.send(waiting, now)

    def send(self, waiting: Waiting, now: float) -> None:
        assert self.channel is not None
        waiting.push = structs.replace(waiting.push, term=self.term)
        waiting.sent_at = now
        self.channel.send(waiting.push, waiting.frames)

    def hear(self, received: Received) -> None:
        message, worker = received.message, self.worker
        if isinstance(message, Welcome):
            if message.term >= self.term:
                self.term, self.is_welcome = message.term, True
        elif isinstance(message, Refusal):
            is_known = message.code in TRANSIENT or "pulls of" in message.detail  # late ones, said twice
            assert is_known, f"{worker.name} was refused: {message}"
            self.is_welcome = self.is_welcome and message.code in ("not-initialised", "not-served")
        elif isinstance(message, Initialised):
            worker.has_initialised.add(self.part)
        elif isinstance(message, Pushed | Pulled):
            if isinstance(message, Pushed):
                self.hear_verdicts(message)
            elif message.request == self.pulling:
                self.pulling = 0
            at = 0
            for value in message.values:
                frames = [np.frombuffer(frame, np.uint8) for frame in received.frames[at : at + value.frames]]
                worker.take(value.block, value.edition, value.kind, value.encoding, frames)
                at += value.frames

    def hear_verdicts(self, message: Pushed) -> None:
        if message.request not in self.waiting:
            return
        for refused in message.refused:
            assert refused.code == "not-initialised", f"{self.worker.name} was refused what is its right: {refused}"
        for verdict in message.acknowledged:
            self.worker.acknowledged[verdict.block] = self.worker.incarnation, verdict.sequence
        if not message.refused:
            del self.waiting[message.request]


class Worker:
    """Pushes an update of every block when the last one is acknowledged, and pulls with it."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.incarnation = 1
        self.acknowledged: dict[int, tuple[int, int]] = {}
        self.has_initialised: set[str] = set()
        self.begin(1)

    def begin(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.step = self.request = 0
        self.links = {part: Link(self, part) for part in PARTS}
        self.sequences = dict.fromkeys(range(len(LAYOUT.blocks)), 0)
        self.editions = dict.fromkeys(self.sequences, -1)
        self.values = {block: np.zeros(LAYOUT.blocks[block].elements, np.float32) for block in self.sequences}

    def turn(self, now: float, may_push: bool) -> None:
        for part, (address, term) in self.world.told.items():
            self.links[part].follow(address, term)
        for part, link in self.links.items():
            link.turn(now)
            if not link.is_welcome or link.channel is None:
                continue
            (block,) = PARTS[part]
            chance = self.world.chance
            if self.name == "w0" and part not in self.has_initialised:
                first = np.arange(LAYOUT.blocks[block].elements, dtype=np.float32).tobytes()
                self.request += 1
                initialise = Initialise(
                    request=self.request, job="job", term=link.term, layout=LAYOUT.fingerprint, blocks=(block,)
                )
                link.channel.send(initialise, [first])
            elif self.editions[block] < 0 or (not link.waiting and not may_push) or chance.random() < 0.1:
                link.pulling = link.pulling or self.head(link)["request"]
                head = {**self.head(link), "request": link.pulling}
                link.channel.send(Pull(**head, wants=(Want(block, self.editions[block]),)))
            elif not link.waiting and chance.random() < 0.7:
                self.push(link, block, now)

    def head(self, link: Link) -> dict[str, Any]:
        self.request += 1
        return {"request": self.request, "job": "job", "term": link.term, "worker": self.name,
                "incarnation": self.incarnation, "step": self.step}  # fmt: skip

    def push(self, link: Link, block: int, now: float) -> None:
        self.step += 1
        self.sequences[block] += 1
        encoding = self.world.push_encoding
        frame = np.empty(encoding.frame_bytes(LAYOUT.blocks[block].elements), np.uint8)
        frame = frame[: encoding.encode(self.world.gradient(self, block, self.sequences[block]), frame)]
        update = BlockUpdate(block, self.sequences[block], self.editions[block], encoding.identifier)
        push = Push(**self.head(link), updates=(update,), wants=(Want(block, self.editions[block]),))
        waiting = link.waiting[push.request] = Waiting(push, [frame.tobytes()], now)
        link.send(waiting, now)

    def take(self, block: int, edition: int, kind: str, encoding: str, frames: list[npt.NDArray[np.uint8]]) -> None:
        held, missing = self.editions[block], edition - self.editions[block]
        member = parse_encoding(encoding)
        if kind == "snapshot" and edition > held:
            member.decode(frames[0], self.values[block])
        elif kind == "deltas" and 0 <= missing <= len(frames) and held >= 0:
            for frame in frames[len(frames) - missing :]:
                member.decode_add(frame, self.values[block])
        elif kind != "current":
            return
        self.editions[block] = max(held, edition)
        self.world.served(block, self.editions[block], self.values[block])


@dataclass
class Counts:
    """Faults that fired."""

    crashes: int = 0
    stops: int = 0
    cuts: int = 0
    deafnesses: int = 0
    full_disks: int = 0
    compared: int = 0  # backups with their primaries
    taken_over: int = 0  # parts by a backup


class World:
    """Args:
    seed: of everything.
    log: journal, or journal+fsync: then machines die too.
    settings: of the job.
    """

    def __init__(self, seed: int, log: str, **settings: Any) -> None:
        self.chance = random.Random(seed)
        self.log = log
        self.net = MemoryNetwork(seed, drop=0.03, duplicate=0.03, reorder=0.05, delay=(0.0, 0.04))
        specification = {"name": "job", "model": {"family": "recurrent"}, "durability": {"log": log}, **settings}
        self.specification = json.dumps(specification)
        self.push_encoding = make_encoding(specification["push"]["encoding"])
        self.folders: dict[tuple[str, str], MemoryFolder] = {}
        self.digests: dict[Part, dict[int, str]] = {}  # what a primary was after each record, as long as it was one
        self.lines: dict[tuple[str, str, int, int], Part] = {}  # part, primary, incarnation, line -> whose it is
        self.served_bits: dict[tuple[int, int], bytes] = {}
        self.counts = Counts()
        self.is_faulty = True
        self.coordinator = Coordinator(self)
        self.processes: dict[str, Process | None] = {name: Process(self, name) for name in SHARDS}
        self.back_at = dict.fromkeys(SHARDS, 0.0)
        self.told: dict[str, tuple[str, int]] = {}  # part -> address, term, as the workers know it
        self.workers = [Worker(self, name) for name in WORKERS]
        self.cut_until: dict[str, float] = {}

    def folder(self, shard: str, part: str) -> MemoryFolder:
        return self.folders.setdefault((shard, part), MemoryFolder(self.chance.randrange(2**32)))

    def part_order(self, part: str, term: int, members: Any, role: Any, partner: Partner | None) -> PartOrder:
        return PartOrder(
            part=part, job="job", specification=self.specification, term=term, phase=0, layout=LAYOUT,
            blocks=PARTS[part], members=tuple(Member(name, 1) for name in members), role=role, partner=partner,
        )  # fmt: skip

    def gradient(self, worker: Worker, block: int, sequence: int) -> npt.NDArray[np.float32]:
        draw = np.random.default_rng([WORKERS.index(worker.name), block, sequence, worker.incarnation])
        return draw.normal(0, 1, LAYOUT.blocks[block].elements).astype(np.float32)

    # ------------------------------------------------------------------------- its life

    def run(self, steps: int) -> None:
        """So many steps with faults; then a calm end in which everything is acknowledged and in step."""
        for _ in range(40):
            self.step()
            if len(self.coordinator.sessions) == len(SHARDS):
                break
        for part in PARTS:
            self.coordinator.records[part] = Record((part, self.coordinator.sessions[part].incarnation))
        for _ in range(steps):
            self.harm()
            self.step()
        self.calm()

    def step(self) -> None:
        self.net.advance(STEP_SECONDS * self.chance.choice([0.2, 1.0, 1.0]))
        now = self.net.now
        self.coordinator.turn()
        if self.chance.random() < 0.4:
            self.tell_workers()
        for name in self.chance.sample(SHARDS, len(SHARDS)):
            process = self.processes[name]
            if process is None:
                if now >= self.back_at[name]:
                    self.processes[name] = Process(self, name)
            elif now >= process.is_stopped_until:
                self.turn(process)
        for worker in self.workers:
            worker.turn(now, may_push=self.is_faulty)

    def turn(self, process: Process) -> None:
        try:
            process.server.turn(0.0)
            self.remember(process)
        except CrashError:
            self.counts.crashes += 1
            process.die()
            self.processes[process.name] = None
            self.back_at[process.name] = self.net.now + self.chance.choice([0.1, 1.0, 2.5])
            is_machine = self.log == "journal+fsync" and self.chance.random() < 0.5
            for (shard, _), folder in self.folders.items():
                if shard == process.name:
                    folder.restart(is_machine)
                    folder.capacity = None

    def tell_workers(self) -> None:
        for part, record in self.coordinator.records.items():
            address = self.coordinator.addresses.get(record.primary)
            if address is not None:
                self.told[part] = address, record.term

    def harm(self) -> None:
        chance, now = self.chance, self.net.now
        roll = chance.random()
        if roll < 0.03:
            folders = list(self.folders.values())
            if folders:
                folder = chance.choice(folders)
                folder.crash_at = folder.operations + chance.randint(1, 6)
        elif roll < 0.045:
            process = self.processes[chance.choice(SHARDS)]
            if process is not None:
                process.is_stopped_until = now + chance.choice([0.3, 1.0, 3.0])
                self.counts.stops += 1
        elif roll < 0.06:
            process = self.processes[chance.choice(SHARDS)]
            if process is not None:
                self.net.cut(process.server.address)
                self.cut_until[process.server.address] = now + chance.choice([0.2, 1.5, 3.0])
                self.counts.cuts += 1
        elif roll < 0.075:
            self.coordinator.deaf_until[chance.choice(SHARDS)] = now + chance.choice([0.3, 2.0])
            self.counts.deafnesses += 1
        elif roll < 0.09:
            folders = list(self.folders.values())
            if folders:
                folder = chance.choice(folders)
                folder.capacity = sum(folder.size(name) for name in folder.names()) + chance.randint(0, 300)
                self.counts.full_disks += 1
        elif roll < 0.12:
            for folder in self.folders.values():
                folder.capacity = None
        elif roll < 0.14:
            self.coordinator.members = tuple(name for name in WORKERS if chance.random() < 0.7)
        elif roll < 0.15:
            worker = chance.choice(self.workers)
            worker.begin(worker.incarnation + 1)
        elif roll < 0.18:
            self.harm_primary(chance.choice(list(PARTS)))
        for address, until in list(self.cut_until.items()):
            if now >= until:
                self.net.heal(address)
                del self.cut_until[address]

    def harm_primary(self, part: str) -> None:
        """Kill, or stop for longer than a session, the primary of a part whose backup is in step."""
        record = self.coordinator.records[part]
        process = self.processes[record.primary[0]]
        if not record.is_synced or process is None:
            return
        if self.chance.random() < 0.5:
            folder = self.folder(process.name, part)
            folder.crash_at = folder.operations + self.chance.randint(1, 3)
        else:
            process.is_stopped_until = self.net.now + self.chance.choice([1.0, 2.0])
            self.counts.stops += 1

    def calm(self) -> None:
        """No more faults: everybody is answered, every part has a backup in step, and no push is made any more."""
        self.is_faulty = False
        self.net.drop = self.net.reorder = self.net.duplicate = 0.0
        for address in self.cut_until:
            self.net.heal(address)
        for folder in self.folders.values():
            folder.crash_at = folder.capacity = None
        for process in self.processes.values():
            if process is not None:
                process.is_stopped_until = 0.0
        self.coordinator.deaf_until = dict.fromkeys(SHARDS, 0.0)
        self.coordinator.members = ()
        for _ in range(CALM_STEPS):
            for folder in self.folders.values():
                folder.crash_at = folder.capacity = None
            self.step()
            if self.is_settled():
                break
        else:
            raise AssertionError(f"not settled: {self.why_not_settled()}")
        for part, record in self.coordinator.records.items():
            self.check_in_step(part, record)

    def is_settled(self) -> bool:
        return not self.why_not_settled()

    def why_not_settled(self) -> str:
        for worker in self.workers:
            for part, link in worker.links.items():
                if link.waiting or worker.editions[PARTS[part][0]] < 0:
                    return f"{worker.name} waits for {part}: {link.waiting or 'a first value'}"
        for part, record in self.coordinator.records.items():
            if not record.is_synced:
                return f"{part} has no backup in step: {record}"
            serving = self.serving_of(part, record)
            if serving is None:
                return f"{part} is not served: {record}"
            if serving.publishing.unpublished():
                return f"{part} has something to publish"
            report = self.processes[record.primary[0]].server._parts[part].report()
            if report.stored < report.record:
                return f"{part} has {report.record} records, stored are {report.stored}: {report.waiting_for}"
        return ""

    def serving_of(self, part: str, record: Record) -> Serving | None:
        process = self.processes[record.primary[0]]
        found = None if process is None else process.server._parts.get(part)
        return None if found is None else found.core.serving

    # ------------------------------------------------------------------------ what must hold

    def remember(self, process: Process) -> None:
        for name, part in process.server._parts.items():
            serving, journal = part.core.serving, part._journal
            if serving is not None and journal is not None:
                digest = digest_of(serving)
                known = self.digests.setdefault(part, {}).setdefault(journal.number, digest)
                assert known == digest, f"record {journal.number} of {name} has two states"
                if part._link is not None:
                    self.lines[name, process.name, process.incarnation, part._link.stream._line] = part
        if self.chance.random() < 0.5:
            return
        for name, standby in process.server._standbys.items():
            store = standby._store
            if store is not None and store.serving is not None and store.line is not None:
                self.compare(name, store.line, store.applied, store.serving)

    def compare(self, part: str, line: tuple[str, int, int], applied: int, serving: Serving) -> None:
        """A backup is a prefix of its primary."""
        primary = self.lines.get((part, *line))
        digest = None if primary is None else self.digests[primary].get(applied)
        if digest is not None:
            self.counts.compared += 1
            assert digest_of(serving) == digest, f"{part} after record {applied}: the backup of {line} differs"

    def check_served(self, shard: str, part: str, serving: Serving, number: int) -> None:
        """Whoever begins to serve has all that was acknowledged, and knows every edition that was served."""
        for worker in self.workers:
            for block in PARTS[part]:
                mark = worker.acknowledged.get(block)
                if mark is None:
                    continue
                held = serving.blocks[block].marks.as_dict().get(worker.name)
                text = f"{worker.name} at block {block} was acknowledged {mark}, {shard} has {held} (record {number})"
                assert held is not None, text
                assert held >= mark, text
        for block, edition in self.served_bits:
            if block in PARTS[part]:
                serving.publishing.staleness(serving.blocks[block], edition)  # raises for one that was never published

    def served(self, block: int, edition: int, values: npt.NDArray[np.float32]) -> None:
        """Whoever holds an edition holds the same bits, whichever process they came from."""
        bits = values.tobytes()
        assert self.served_bits.setdefault((block, edition), bits) == bits, f"block {block}, edition {edition} differs"

    def check_in_step(self, part: str, record: Record) -> None:
        assert record.backup is not None
        process = self.processes[record.backup[0]]
        serving = self.serving_of(part, record)
        assert process is not None
        assert serving is not None
        store = process.server._standbys[part]._store
        assert store is not None
        store.apply_all()
        assert store.serving is not None
        assert digest_of(store.serving) == digest_of(serving), f"the backup of {part} is not what its primary is"
