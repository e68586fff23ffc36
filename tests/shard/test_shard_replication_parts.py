"""The pieces of replication by themselves: what a backup takes, from whom, and what it becomes."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from journal_rig import BLOCKS, LAYOUT, Rig, digest_of, make_order
from msgspec import structs
from replication_rig import Prepared
from test_shard_journal_simulated import JOBS

from paramserver.protocol.layout import Parameter, cut_layout
from paramserver.protocol.memory import MemoryNetwork
from paramserver.protocol.messages import (
    BlockUpdate,
    Hello,
    Initialise,
    Initialised,
    Partner,
    PartOrder,
    Push,
    Pushed,
    Refusal,
    Register,
    Replicate,
    Stored,
    Welcome,
)
from paramserver.protocol.transport import Received
from paramserver.shard import part as part_module
from paramserver.shard.core import ShardCore
from paramserver.shard.journal import keeper, segments
from paramserver.shard.journal.home import JournalHome
from paramserver.shard.journal.keeper import ShardJournal, open_journal
from paramserver.shard.journal.layout import PREAMBLE_BYTES, JournalError
from paramserver.shard.journal.memory import CrashError, MemoryFolder
from paramserver.shard.part import Part
from paramserver.shard.replication import source, store, stream
from paramserver.shard.replication.assembly import Assembly
from paramserver.shard.replication.link import Link
from paramserver.shard.replication.standby import Standby
from paramserver.shard.replication.store import Store
from paramserver.shard.replication.stream import Stream
from paramserver.shard.server import ShardServer
from paramserver.shard.surroundings import Surroundings

PRIMARY, BACKUP = Partner("s0", 1, "s0"), Partner("s1", 1, "s1")


class Pump:
    """A stream and a store with nothing between them."""

    def __init__(self, order: PartOrder, journal: ShardJournal, into: Store) -> None:
        self.stream = Stream(structs.replace(order, partner=BACKUP), lambda: ("s0", 1), journal, count(1))
        self.store = into
        self.now = 0.0
        self.pieces: list[tuple[Replicate, bytes]] = []

    def turn(self) -> None:
        self.now += 0.3
        asked = None
        for piece in self.stream.pieces(self.now):
            frame = np.empty(piece.size, np.uint8)
            if piece.chunk is not None:
                self.stream.read(piece, frame)
            message, asked = piece.message, piece.message
            if piece.chunk is not None:
                self.pieces.append((message, frame.tobytes()))
                line = message.shard, message.incarnation, message.line
                if line != self.store.line:
                    self.store.begin(line)
                self.store.take(message, memoryview(frame), self.now)
        self.store.look_after()
        self.store.commit()
        line = 0 if self.store.line is None else self.store.line[2]
        if asked is not None or self.store.is_restoring or self.stream.stored != self.store.record:
            self.stream.hear(
                Stored(part="shard-0", line=line, ask=self.stream._ask, received=self.store.received,
                       record=self.store.record), self.now,
            )  # fmt: skip

    def until_in_step(self, journal: ShardJournal, turns: int = 2000) -> None:
        for _ in range(turns):
            self.turn()
            if self.stream.is_synced and self.stream.stored == journal.number:
                return
        raise AssertionError(f"stored {self.stream.stored} of {journal.number} after {turns} turns")


@pytest.mark.parametrize("begins_at", [0, 30], ids=["young", "from a snapshot"])
@pytest.mark.parametrize("job", JOBS)
def test_a_promoted_backup_is_bit_for_bit_what_its_primary_acknowledged(
    job: str, begins_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimizer state, published replica, open rounds, watermarks, clocks, counters of staleness."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1500)
    monkeypatch.setattr(keeper, "SNAPSHOT_BYTES", 4000 if begins_at else 10**6)
    monkeypatch.setattr(keeper, "SNAPSHOT_RATIO", 0)
    monkeypatch.setattr(source, "CHUNK_BYTES", 700)
    monkeypatch.setattr(stream, "PIECE_BYTES", 300)
    rig = Rig(7, "journal", **JOBS[job])
    rig.start()
    pump = None
    for step in range(60):
        rig.act()
        if step == begins_at:
            if begins_at:
                assert rig.core.serving is not None
                rig.journal.snapshot(rig.core.serving)
            pump = Pump(rig.order, rig.journal, Store(MemoryFolder(), rig.order, in_background=False))
        if pump is not None:
            pump.turn()
    assert pump is not None
    pump.until_in_step(rig.journal)
    assert rig.core.serving is not None
    kinds = {message.kind for message, _ in pump.pieces}
    assert kinds == ({"records", "manifest", "arrays"} if begins_at else {"records"})
    found = pump.store.finish()
    assert found is not None
    serving, journal = found
    assert digest_of(serving) == digest_of(rig.core.serving)
    assert journal.number == rig.journal.number
    # What it was given goes on as a journal of its own: a restart finds the same.
    core = ShardCore("shard-0")
    core.adopt(serving)
    core.take_order(structs.replace(rig.order, term=2))
    journal.commit()
    after = digest_of(serving)
    reopened, _ = open_journal(pump.store.folder, structs.replace(rig.order, term=2), in_background=False)
    assert digest_of(reopened) == after


def test_a_large_part_is_copied_through_real_files_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE_BYTES", 2**18)
    monkeypatch.setattr(stream, "WINDOW_BYTES", 2**20)
    layout = cut_layout([Parameter("a", (1024, 640), "first")])
    order = structs.replace(
        make_order("journal", **JOBS["published"]), layout=layout, blocks=tuple(range(len(layout.blocks)))
    )
    serving, journal = JournalHome(tmp_path, "s0").open(order)
    draw = np.random.default_rng(1)
    for block in serving.blocks.values():
        serving.initialise([(block, draw.normal(0, 1, block.elements).astype(np.float32).view(np.uint8))])
    journal.commit()
    journal.snapshot(serving)
    while journal.is_sealing:
        journal.snapshot_if_due(serving)
    pump = Pump(order, journal, Store(JournalHome(tmp_path, "s1").hold(order), order))
    pump.until_in_step(journal, turns=200_000)
    arrays = [message for message, _ in pump.pieces if message.kind == "arrays"]
    assert len(arrays) > 20
    found = pump.store.finish()
    assert found is not None
    assert digest_of(found[0]) == digest_of(serving)
    found[1].close()
    journal.close()


def test_a_line_begins_where_a_snapshot_does_not_begin_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The primary died after its snapshot was whole and before anything was written behind it."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 10**6)
    rig = Rig(3, "journal", **JOBS["published"])
    rig.start()
    for _ in range(20):
        rig.act()
    assert rig.core.serving is not None
    rig.journal.needed = 1  # the segments stay, as where the process dies before it removes them
    rig.journal.snapshot(rig.core.serving)
    serving, journal = open_journal(rig.folder, rig.order, in_background=False)
    assert segments.segment_numbers(rig.folder) == [1]
    core = ShardCore("shard-0")
    core.adopt(serving)
    core.take_order(structs.replace(rig.order, members=()))
    journal.commit()
    pump = Pump(rig.order, journal, Store(MemoryFolder(), rig.order, in_background=False))
    pump.until_in_step(journal)
    found = pump.store.finish()
    assert found is not None
    assert digest_of(found[0]) == digest_of(serving)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=14),
    seed=st.integers(0, 2**32),
)
def test_pieces_come_out_once_and_in_order_however_they_arrive(sizes: list[int], seed: int) -> None:
    chance, at = random.Random(seed), 0
    line = bytes(chance.randrange(256) for _ in range(sum(sizes)))
    pieces = []
    for size in sizes:
        pieces.append((piece_at(at), line[at : at + size]))
        at += size
    assembly, found = Assembly(), b""
    while assembly.received < len(line):
        arriving = [piece for piece in pieces if chance.random() < 0.8] + [chance.choice(pieces)]
        chance.shuffle(arriving)
        for message, frame in arriving:
            found += b"".join(bytes(data) for _, data in assembly.take(message, memoryview(frame)))
    assert found == line


def piece_at(at: int) -> Replicate:
    return Replicate(part="shard-0", job="job", term=1, shard="s0", incarnation=1, line=1, ask=1, at=at)


# ------------------------------------------------------------------------------ who may replicate


class Home:
    """Folders in memory."""

    def __init__(self) -> None:
        self.folder = MemoryFolder()

    def hold(self, order: PartOrder) -> MemoryFolder:
        return self.folder

    def open(self, order: PartOrder) -> Any:
        return open_journal(self.folder, order, in_background=False)


class World:
    """A listener, and what parts of one shard share."""

    def __init__(self) -> None:
        self.net = MemoryNetwork(1)
        self.listener = self.net.listen("here")
        self.channel = self.net.connect("here")
        self.home = Home()
        self.around = Surroundings(
            self.listener, self.net.connect, lambda: ("s0", 1), self.home, lambda: self.net.now, Prepared, False
        )

    def received(self, message: Any, frames: list[bytes]) -> Received:
        self.channel.send(message, frames)
        self.net.advance(0.01)
        found = self.listener.receive(0)
        assert isinstance(found, Received)
        return found

    def heard(self) -> list[Any]:
        self.net.advance(0.01)
        said = []
        while isinstance(found := self.channel.receive(0), Received):
            said.append(found.message)
        return said


def backed_up(**partner: Any) -> PartOrder:
    order = make_order("journal", **JOBS["published"])
    return structs.replace(order, role="backup", partner=structs.replace(PRIMARY, **partner), term=3)


def pieces_of(job: str = "published", steps: int = 12) -> tuple[Rig, list[tuple[Replicate, bytes]]]:
    """What a primary under term 3 sends."""
    rig = Rig(5, "journal", **JOBS[job])
    rig.start()
    for _ in range(steps):
        rig.act()
    pump = Pump(rig.order, rig.journal, Store(MemoryFolder(), rig.order, in_background=False))
    pump.until_in_step(rig.journal)
    return rig, [(structs.replace(message, term=3), frame) for message, frame in pump.pieces]


def standby(order: PartOrder) -> tuple[World, Standby]:
    world = World()
    made = Standby(order, world.around)
    made.look_after()
    return world, made


def test_a_backup_stores_what_its_partner_sends_and_says_how_far_it_is() -> None:
    rig, pieces = pieces_of()
    world, made = standby(backed_up())
    for message, frame in pieces:
        assert made.handle(world.received(message, [frame]), message) is None
    made.look_after()
    (answer,) = world.heard()
    assert (answer.line, answer.record) == (1, rig.journal.number)
    report = made.report()
    assert (report.role, report.record, report.term) == ("backup", rig.journal.number, 3)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"term": 2}, "wrong-term"),
        ({"shard": "s7"}, "wrong-term"),
        ({"incarnation": 2}, "wrong-term"),
        ({"job": "other"}, "wrong-job"),
    ],
)
def test_who_is_not_the_ordered_primary_is_refused_and_changes_nothing(changes: dict[str, Any], code: str) -> None:
    rig, pieces = pieces_of()
    world, made = standby(backed_up())
    for message, frame in pieces:
        made.handle(world.received(message, [frame]), message)
    made.look_after()
    world.heard()
    later = structs.replace(pieces[-1][0], at=made._store.received, ask=9, **changes)  # type: ignore[union-attr]
    refusal = made.handle(world.received(later, [b"x" * 30]), later)
    made.look_after()
    assert refusal is not None
    assert refusal.code == code
    assert [said.code for said in world.heard()] == [code]
    assert made.report().record == rig.journal.number
    assert made.report().refusals == {code: 1}


def test_a_key_that_is_not_the_primarys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, pieces = pieces_of()
    world, made = standby(backed_up(key="the primary's"))
    proven = ["another"]
    monkeypatch.setattr(world.listener, "key_of", lambda peer: proven[0])
    message, frame = pieces[0]
    refusal = made.handle(world.received(message, [frame]), message)
    assert refusal is not None
    assert refusal.code == "wrong-key"
    proven[0] = "the primary's"
    assert made.handle(world.received(message, [frame]), message) is None


def test_what_may_be_promoted_is_not_given_up_for_another_line() -> None:
    rig, pieces = pieces_of()
    world, made = standby(backed_up())
    for message, frame in pieces:
        made.handle(world.received(message, [frame]), message)
    made.follow(backed_up(is_synced=True))
    anew = structs.replace(pieces[0][0], line=2)
    refusal = made.handle(world.received(anew, [pieces[0][1]]), anew)
    assert refusal is not None
    assert refusal.code == "not-served"
    found = made.promote()
    assert found is not None
    assert found[1].number == rig.journal.number


def test_a_damaged_chunk_is_refused_and_taken_when_it_comes_whole() -> None:
    rig, pieces = pieces_of()
    world, made = standby(backed_up())
    for message, frame in pieces:
        damaged = bytearray(frame)
        damaged[len(frame) // 2] ^= 0xFF
        refusal = made.handle(world.received(message, [bytes(damaged)]), message)
        assert refusal is not None
        assert refusal.code == "corrupt-frame"
        assert made.handle(world.received(message, [frame]), message) is None
    made.look_after()
    assert made.report().record == rig.journal.number


def test_a_backup_that_would_compute_other_bits_refuses_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _, pieces = pieces_of()
    world, made = standby(backed_up())
    monkeypatch.setattr(store, "this_build", lambda: "another build")
    message, frame = pieces[0]
    refusal = made.handle(world.received(message, [frame]), message)
    assert refusal is not None
    assert refusal.code == "other-build"
    assert "use machines and packages alike" in made.report().failed


@pytest.mark.parametrize("in_background", [False, True])
def test_a_backup_outlives_a_damaged_snapshot_of_its_primary_and_says_why(in_background: bool) -> None:
    """Its process serves other parts, which a bad disk elsewhere must not take along."""
    rig = Rig(5, "journal", **JOBS["published"])
    rig.start()
    for _ in range(12):
        rig.act()
    assert rig.core.serving is not None
    rig.journal.snapshot(rig.core.serving)
    pump = Pump(rig.order, rig.journal, Store(MemoryFolder(), rig.order, in_background=False))
    pump.until_in_step(rig.journal)
    world = World()
    world.around = replace(world.around, in_background=in_background)
    made = Standby(backed_up(), world.around)
    made.look_after()
    for message, frame in pump.pieces:
        message = structs.replace(message, term=3)
        if message.kind == "arrays":
            frame = frame[:-1] + bytes([frame[-1] ^ 1])
        made.handle(world.received(message, [frame]), message)
    if made._store is not None and made._store._restoring is not None:
        made._store._restoring.join()
    made.look_after()
    assert "what s0 sent cannot be used" in made.report().failed
    assert "is not what was written" in made.report().failed
    assert made.report().record == 0
    assert made.promote() is None


def test_a_primary_outlives_damage_in_a_segment_that_a_new_backup_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has in memory what the record says, and waits for nobody who is not in step."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1500)
    rig = Rig(5, "journal", **JOBS["published"])
    rig.start()
    for _ in range(40):
        rig.act()
    rig.journal.commit()
    first, *later = segments.segment_numbers(rig.folder)
    assert later
    rig.folder.damage(segments.segment_name(first), PREAMBLE_BYTES)
    world = World()
    order = structs.replace(rig.order, partner=structs.replace(BACKUP, address="here"))
    link = Link(Stream(order, lambda: ("s0", 1), rig.journal, count(1)), world.net.connect)
    link.send(0.0)
    link.stream.hear(Stored(part="shard-0", line=0, ask=1, received=0, record=0), 0.0)
    for turn in range(1, 4):
        link.send(0.3 * turn)
        assert not link.stream.must_wait
        assert not link.stream.is_synced


def test_a_backup_without_a_whole_copy_cannot_be_promoted() -> None:
    _, made = standby(backed_up())
    assert made.promote() is None


def test_an_unfinished_copy_never_passes_for_a_journal() -> None:
    """A backup that dies while it takes a new line leaves nothing that a restart would serve, until it is whole."""
    before = Rig(5, "journal", **JOBS["published"])
    before.start()
    for _ in range(25):
        before.act()
    before.journal.close()
    rig, pieces = pieces_from_snapshot()
    taken = Store(before.folder, rig.order, in_background=False)
    for message, frame in pieces:
        if taken.line is None:
            taken.begin(("s0", 1, 1))
        if taken.serving is None:
            with pytest.raises(JournalError, match="unfinished copy"):
                open_journal(before.folder, rig.order, in_background=False)
        taken.take(message, memoryview(frame), 0.0)
    taken.commit()
    serving, _ = open_journal(before.folder, rig.order, in_background=False)
    assert digest_of(serving) == digest_of(rig.core.serving)  # type: ignore[arg-type]


def test_a_backup_that_dies_at_any_write_of_a_new_line_is_whole_or_refused() -> None:
    rig, pieces = pieces_from_snapshot()
    outcomes = {"empty": 0, "refused": 0, "whole": 0}
    for fails_at in range(1, 200):
        folder = MemoryFolder(fails_at)
        folder.crash_at = fails_at
        taken = Store(folder, rig.order, in_background=False)
        try:
            taken.begin(("s0", 1, 1))
            for message, frame in pieces:
                taken.take(message, memoryview(frame), 0.0)
                taken.commit()
            break  # all of it was written before the operation at which it should have died
        except CrashError:
            folder.restart(is_machine=fails_at % 2 == 0)
        if not folder.names():
            outcomes["empty"] += 1  # as it was before
        elif keeper.UNFINISHED in folder.names():
            outcomes["refused"] += 1
            with pytest.raises(JournalError, match="unfinished copy"):
                open_journal(folder, rig.order, in_background=False)
        else:
            outcomes["whole"] += 1
            serving, journal = open_journal(folder, rig.order, in_background=False)
            assert journal.number >= pieces[0][0].record
            assert serving.blocks[0].is_initialised
    else:
        raise AssertionError("it never came to the end of the line")
    assert outcomes["refused"] > 5, outcomes
    assert outcomes["whole"] > 0, outcomes


def pieces_from_snapshot() -> tuple[Rig, list[tuple[Replicate, bytes]]]:
    """What a primary sends that has a snapshot and records after it."""
    rig = Rig(6, "journal", **JOBS["published"])
    rig.start()
    for step in range(24):
        rig.act()
        if step == 12:
            assert rig.core.serving is not None
            rig.journal.snapshot(rig.core.serving)
    pump = Pump(rig.order, rig.journal, Store(MemoryFolder(), rig.order, in_background=False))
    pump.until_in_step(rig.journal)
    assert len(pump.pieces) > 2
    return rig, pump.pieces


# ----------------------------------------------------------------------- what a primary waits for


class Serving:
    """A part that is its own primary, with one worker that has said Hello."""

    def __init__(self, partner: Partner | None) -> None:
        self.world = World()
        self.part = Part(ShardCore("shard-0"), self.world.around)
        self.order(partner)
        self.part.look_after_preparation()
        hello = Hello(worker="w0", incarnation=1, job="job", layout=LAYOUT.fingerprint, part="shard-0")
        frames = [bytes(4 * LAYOUT.blocks[block].elements) for block in BLOCKS]
        self.tell(hello, [])
        first = Initialise(request=1, job="job", term=1, layout=LAYOUT.fingerprint, blocks=tuple(BLOCKS))
        self.tell(first, frames)

    def order(self, partner: Partner | None) -> None:
        self.part.follow(structs.replace(make_order("journal", **JOBS["fresh"]), partner=partner))

    def tell(self, message: Any, frames: list[bytes]) -> None:
        self.part.handle(self.world.received(message, frames))
        self.part.look_after()

    def push(self, sequence: int) -> None:
        update = BlockUpdate(0, sequence, 0, "fp32")
        push = Push(
            request=1 + sequence, job="job", term=1, worker="w0", incarnation=1, step=sequence, updates=(update,)
        )
        self.tell(push, [bytes(4 * LAYOUT.blocks[0].elements)])


def kinds(said: list[Any]) -> list[type]:
    return [type(message) for message in said]


def test_a_primary_whose_backup_may_be_promoted_answers_nobody_without_it() -> None:
    serving = Serving(structs.replace(BACKUP, is_synced=True))
    serving.push(1)
    assert serving.world.heard() == []
    serving.world.net.advance(1.0)
    serving.part.look_after()
    assert serving.part.report().waiting_for.startswith("s1, its backup, has stored record 0 of")
    serving.order(None)  # the recorded grant
    serving.part.look_after()
    assert kinds(serving.world.heard()) == [Welcome, Initialised, Pushed]
    assert serving.part.report().waiting_for == ""


def test_another_partnership_with_the_same_process_is_a_grant_and_begins_anew() -> None:
    serving = Serving(structs.replace(BACKUP, is_synced=True))
    assert serving.world.heard() == []
    serving.order(structs.replace(BACKUP, is_synced=False, number=2))
    serving.part.look_after()
    assert kinds(serving.world.heard()) == [Welcome, Initialised]
    report = serving.part.report()
    assert (report.is_synced, report.partner, report.partner_incarnation, report.partner_number) == (False, "s1", 1, 2)


def test_a_primary_takes_nothing_more_when_too_many_answers_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_module, "MOST_HELD", 3)
    serving = Serving(structs.replace(BACKUP, is_synced=True))
    for sequence in range(1, 8):
        serving.push(sequence)
    report = serving.part.report()
    assert report.updates == 2  # beside the answers to its Hello and its first values
    assert report.refusals == {"unanswered": 5}
    serving.order(None)
    serving.push(3)
    assert [message.acknowledged[0].sequence for message in serving.world.heard() if isinstance(message, Pushed)] == [
        1,
        2,
        3,
    ]


def test_a_primary_without_a_backup_in_step_answers_at_once() -> None:
    serving = Serving(BACKUP)
    serving.push(1)
    assert kinds(serving.world.heard()) == [Welcome, Initialised, Pushed]


def test_a_worker_that_comes_to_the_backup_is_refused_by_name() -> None:
    world = World()
    server = ShardServer(
        world.net, "s1", "coordinator", Register(role="shard", name="s1"), world.home,
        clock=lambda: world.net.now, prepare=Prepared, in_background=False,
    )  # fmt: skip
    server.follow((backed_up(),))
    worker = world.net.connect("s1")
    worker.send(Hello(worker="w0", incarnation=1, job="job", layout=LAYOUT.fingerprint, part="shard-0"))
    world.net.advance(0.01)
    server.turn(0.0)
    world.net.advance(0.01)
    answer = worker.receive(0)
    assert isinstance(answer, Received)
    assert isinstance(answer.message, Refusal)
    assert answer.message.code == "unknown-part"


def test_a_shard_that_is_told_to_serve_what_it_has_only_in_part_says_that_it_cannot() -> None:
    world = World()
    server = ShardServer(
        world.net, "s1", "coordinator", Register(role="shard", name="s1"), world.home,
        clock=lambda: world.net.now, prepare=Prepared, in_background=False,
    )  # fmt: skip
    server.follow((backed_up(),))
    server.turn(0.0)
    server.follow((structs.replace(backed_up(), role="primary", partner=None, term=4),))
    (report,) = server.report().parts
    assert "no whole copy" in report.failed
