"""A shard with a journal in simulated memory, and workers that speak to it through a network that loses and repeats.

Everything is decided by one seed. The shard is driven as its server drives it: a batch of messages, the commit, then
the replies. A worker is a small model of the real one: it resends until it is answered, and applies what it pulls.
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from paramserver.encoding import make_encoding, parse_encoding
from paramserver.protocol.layout import Layout, Parameter, cut_layout
from paramserver.protocol.messages import (
    BlockUpdate,
    Hello,
    Initialise,
    Member,
    Message,
    PartOrder,
    Pull,
    Pulled,
    Push,
    Pushed,
    Tick,
    Want,
)
from paramserver.shard.core import Reply, ShardCore
from paramserver.shard.journal.keeper import ShardJournal, open_journal
from paramserver.shard.journal.memory import CrashError, MemoryFolder
from paramserver.shard.journal.replay import kept
from paramserver.shard.serving import Serving

LAYOUT: Layout = cut_layout([Parameter("a", (8, 9), "first"), Parameter("b", (5, 8), "second")])
BLOCKS = range(len(LAYOUT.blocks))
WORKERS = ("w0", "w1", "w2")
Frames = list[memoryview]


def make_order(log: str, members: tuple[str, ...] = (), **settings: Any) -> PartOrder:
    specification = {
        "name": "job",
        "model": {"family": "recurrent"},
        "cluster": {"workers": len(WORKERS)},
        "durability": {"log": log},
        **settings,
    }
    return PartOrder(
        part="shard-0",
        job="job",
        specification=json.dumps(specification),
        term=1,
        phase=0,
        layout=LAYOUT,
        blocks=tuple(BLOCKS),
        members=tuple(Member(name, 1) for name in members),
    )


def digest_of(serving: Serving) -> str:
    """A hash over everything that is acknowledged: arrays, versions, watermarks, editions, clocks, counters.

    Left out: counters of what changes no state (pulls, duplicates, refused pushes), and the order, which is given
    again.
    """
    state, arrays = kept(serving)
    telemetry = msgspec.structs.replace(
        state.telemetry,
        pulls=0,
        pushes=0,
        duplicates=0,
        traffic=tuple(r for r in state.telemetry.traffic if r.way == "push"),
    )
    plain = (state.order.members, state.blocks, state.publishing, state.policy, telemetry)
    found = hashlib.blake2b(msgspec.json.encode(plain, order="deterministic"), digest_size=12)
    for name in sorted(arrays):
        found.update(name.encode())
        found.update(arrays[name].tobytes())
    return found.hexdigest()


class ModelWorker:
    """What a worker knows: its sequences, what of them was acknowledged, and its replica."""

    def __init__(self, rig: Rig, name: str) -> None:
        self.rig = rig
        self.name = name
        self.incarnation = 1
        self.step = 0
        self.acknowledged: dict[int, tuple[int, int]] = {}  # block -> (incarnation, sequence)
        self.restart(1)

    def restart(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.step = 0
        self.request = 0
        self.sequences = dict.fromkeys(BLOCKS, 0)
        self.editions = dict.fromkeys(BLOCKS, -1)
        self.values = {block: np.zeros(LAYOUT.blocks[block].elements, np.float32) for block in BLOCKS}
        self.waiting: dict[int, tuple[Push, Frames]] = {}  # pushes without an answer

    def head(self) -> dict[str, Any]:
        self.request += 1
        return {"request": self.request, "job": "job", "term": 1, "worker": self.name,
                "incarnation": self.incarnation, "step": self.step}  # fmt: skip

    def hello(self) -> Hello:
        return Hello(
            worker=self.name, incarnation=self.incarnation, job="job", layout=LAYOUT.fingerprint, part="shard-0"
        )

    def wants(self) -> tuple[Want, ...]:
        return tuple(Want(block, self.editions[block]) for block in BLOCKS)

    def next_message(self, chance: random.Random) -> tuple[Message, Frames]:
        if self.waiting:
            # Sent again with identical bytes: a block has one update on its way at most.
            return chance.choice(list(self.waiting.values()))
        if min(self.editions.values()) < 0 or chance.random() < 0.15:
            return Pull(**self.head(), wants=self.wants()), []
        self.step += 1
        if chance.random() < 0.1:
            return Tick(job="job", worker=self.name, incarnation=self.incarnation, step=self.step), []
        blocks = chance.choice([[0], [1], [0, 1], [0, 1]])
        updates, frames = [], []
        for block in blocks:
            self.sequences[block] += 1
            encoding = self.rig.push_encoding if chance.random() < 0.9 else make_encoding("fp32")
            frame = np.empty(encoding.frame_bytes(LAYOUT.blocks[block].elements), np.uint8)
            frame = frame[: encoding.encode(self.rig.gradient(self.name, block, self.sequences[block]), frame)]
            updates.append(BlockUpdate(block, self.sequences[block], self.editions[block], encoding.identifier))
            frames.append(memoryview(frame.tobytes()))
        wants = self.wants() if chance.random() < 0.7 else ()
        push = Push(**self.head(), updates=tuple(updates), wants=wants, is_pull_slow=chance.random() < 0.4)
        self.waiting[push.request] = push, frames
        return push, frames

    def hear(self, message: Message, frames: list[npt.NDArray[np.uint8]]) -> None:
        if isinstance(message, Pushed) and message.request in self.waiting:
            for verdict in message.acknowledged:
                self.acknowledged[verdict.block] = self.incarnation, verdict.sequence
            assert not message.refused, f"{self.name} was refused what it had a right to: {message.refused}"
            del self.waiting[message.request]
        if isinstance(message, Pushed | Pulled):
            at = 0
            for value in message.values:
                self.take(value.block, value.edition, value.kind, value.encoding, frames[at : at + value.frames])
                at += value.frames

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
        self.rig.served(block, self.editions[block], self.values[block])


class Rig:
    """Args:
    seed: of everything.
    log: journal, or journal+fsync: then the machine dies too.
    settings: of the job.
    """

    def __init__(self, seed: int, log: str, **settings: Any) -> None:
        self.chance = random.Random(seed)
        self.log, self.settings = log, settings
        self.folder = MemoryFolder(seed)
        self.order = make_order(log, WORKERS[:2], **settings)
        self.workers = {name: ModelWorker(self, name) for name in WORKERS}
        self.queue: list[tuple[str, int, Message, Frames]] = []
        self.held: list[Reply] = []  # replies that wait for the commit
        self.now = 0.0
        self.crashes = self.refusals_to_write = self.recoveries = self.snapshots = 0
        self.remembered = -1  # the last record of this life whose state is known
        self.digests: dict[int, str] = {}  # record number -> state after it
        self.committed = 0
        self.served_bits: dict[tuple[int, int], bytes] = {}
        self.core: ShardCore
        self.journal: ShardJournal
        job = json.loads(self.order.specification)
        self.push_encoding = make_encoding(job["push"]["encoding"])

    def gradient(self, worker: str, block: int, sequence: int) -> npt.NDArray[np.float32]:
        draw = np.random.default_rng([WORKERS.index(worker), block, sequence, self.workers[worker].incarnation])
        return draw.normal(0, 1, LAYOUT.blocks[block].elements).astype(np.float32)

    # -------------------------------------------------------------------- the shard's life

    def run(self, steps: int) -> None:
        """So many batches, with crashes; then a calm end in which everything is acknowledged and pulled."""
        self.start()
        for _ in range(steps):
            if self.folder.crash_at is None and self.chance.random() < 0.12:
                self.folder.crash_at = self.folder.operations + self.chance.randint(1, 9)
            if self.chance.random() < 0.06:
                used = sum(len(self.folder.read(name)) for name in self.folder.names())
                self.folder.capacity = used + self.chance.randint(0, 400)
            self.live(self.act)
        self.folder.crash_at = None
        self.folder.capacity = None
        self.end()

    def live(self, act: Any) -> None:
        try:
            act()
        except CrashError:
            self.crashes += 1
            self.remember()  # what the record says in whose write the process died, and which may be whole
            self.folder.restart(is_machine=self.log == "journal+fsync" and self.chance.random() < 0.5)
            self.queue, self.held = [], []
            self.folder.capacity = None
            self.start()

    def start(self) -> None:
        """Open the journal, as often as it takes, and check what it holds."""
        while True:
            if self.chance.random() < 0.2:
                self.folder.crash_at = self.folder.operations + self.chance.randint(1, 6)
            try:
                serving, self.journal = open_journal(self.folder, self.order, in_background=False)
                break
            except CrashError:
                self.crashes += 1
                self.folder.restart(is_machine=self.log == "journal+fsync" and self.chance.random() < 0.5)
        self.folder.crash_at = None
        if self.committed:
            self.check_recovered(serving)
        self.remembered = -1
        self.core = ShardCore("shard-0")
        self.core.adopt(serving)
        self.held += self.core.take_order(self.order)
        self.remember()
        for worker in self.workers.values():
            self.tell(worker.name, worker.hello())
        frames = [memoryview(np.arange(LAYOUT.blocks[block].elements, dtype=np.float32).tobytes()) for block in BLOCKS]
        first = Initialise(request=1, job="job", term=1, layout=LAYOUT.fingerprint, blocks=tuple(BLOCKS))
        self.tell("w0", first, frames)

    def tell(self, worker: str, message: Message, frames: Frames | None = None) -> None:
        peer = f"{worker}/{self.workers[worker].incarnation}".encode()
        self.held += self.core.handle(peer, message, frames or [])
        self.remember()

    def remember(self) -> None:
        assert self.core.serving is not None
        number, digest = self.journal.number, digest_of(self.core.serving)
        if number == self.remembered:
            assert self.digests[number] == digest, f"the state changed after record {number}, and no record says so"
        self.digests[number], self.remembered = digest, number

    def act(self) -> None:
        """One turn of the server's loop."""
        chance = self.chance
        self.now += chance.choice([0.05, 0.05, 0.6])
        if not self.journal.trouble:
            self.send_some()
            if chance.random() < 0.3:
                self.core.publish_due(self.now)
                self.remember()
            if chance.random() < 0.08:
                # Often none: what is published while nobody trains is finer.
                members = () if chance.random() < 0.4 else tuple(name for name in WORKERS if chance.random() < 0.7)
                self.order = make_order(self.log, members, **self.settings)
                self.held += self.core.take_order(self.order)
                self.remember()
            for _ in range(min(len(self.queue), chance.randint(1, 4))):
                worker, incarnation, message, frames = self.queue.pop(chance.randrange(min(3, len(self.queue))))
                if incarnation == self.workers[worker].incarnation:
                    self.tell(worker, message, frames)
                if self.journal.trouble:
                    break
        elif chance.random() < 0.5:
            self.folder.capacity = None
        self.commit()

    def send_some(self) -> None:
        for worker in self.workers.values():
            if self.chance.random() < 0.02:
                worker.restart(worker.incarnation + 1)
                self.tell(worker.name, worker.hello())
            if self.chance.random() < 0.7:
                message, frames = worker.next_message(self.chance)
                for _ in range(self.chance.choice([0, 1, 1, 1, 2])):
                    self.queue.append((worker.name, worker.incarnation, message, frames))

    def commit(self) -> None:
        if not self.journal.commit():
            self.refusals_to_write += 1
            return
        self.committed = self.journal.number
        assert self.core.serving is not None
        before = self.journal.snapshots
        self.journal.snapshot_if_due(self.core.serving)
        self.snapshots += self.journal.snapshots - before
        replies, self.held = self.held, []
        for reply in replies:
            name, incarnation = reply.peer.decode().split("/")
            if self.chance.random() < 0.9 and int(incarnation) == self.workers[name].incarnation:
                self.workers[name].hear(reply.message, list(reply.frames))

    def end(self) -> None:
        """No more faults, and no members, so that nobody waits for a round."""
        self.order = make_order(self.log, (), **self.settings)
        self.held += self.core.take_order(self.order)
        self.remember()
        for _ in range(40):
            self.now += 10.0
            self.core.publish_due(self.now)
            self.remember()
            for worker in self.workers.values():
                for push, frames in list(worker.waiting.values()):
                    self.tell(worker.name, push, frames)
            self.commit()
            if not any(worker.waiting for worker in self.workers.values()):
                break
        for worker in self.workers.values():
            assert not worker.waiting, f"{worker.name} was never answered"

    # ------------------------------------------------------------------------ what must hold

    def check_recovered(self, serving: Serving) -> None:
        self.recoveries += 1
        number = self.journal.number
        assert number >= self.committed, f"record {self.committed} was committed, the journal ends at {number}"
        assert digest_of(serving) == self.digests[number], f"the state after record {number} is another one"
        for number in [later for later in self.digests if later > self.journal.number]:
            del self.digests[number]  # what was never heard of by anybody
        for worker in self.workers.values():
            for block, mark in worker.acknowledged.items():
                held = serving.blocks[block].marks.as_dict().get(worker.name)
                assert held is not None, f"{worker.name} at block {block} was acknowledged {mark}, nothing is left"
                assert held >= mark, f"{worker.name} at block {block} was acknowledged {mark}, the watermark is {held}"
        for block, edition in self.served_bits:
            held = serving.blocks[block]
            serving.publishing.staleness(held, edition)  # raises for one that was never published

    def served(self, block: int, edition: int, values: npt.NDArray[np.float32]) -> None:
        """Whoever holds an edition holds the same bits, whichever life of the shard they came from."""
        bits = values.tobytes()
        assert self.served_bits.setdefault((block, edition), bits) == bits, f"block {block}, edition {edition} differs"
