"""The cut: nobody goes on before all is copied, nothing stands still for longer than its bound, and what fails costs
the checkpoint and not the training."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

from paramserver.coordinator.checkpoints.cut import AGAIN_SECONDS, CUT_SECONDS, STALL_SECONDS, Cuts
from paramserver.coordinator.checkpoints.manifest import FORMAT, Manifest
from paramserver.coordinator.effects import DropCheckpoint, Effect, SealCheckpoint, Send, StorePiece
from paramserver.coordinator.sessions import Session
from paramserver.job import CheckpointSettings
from paramserver.protocol.layout import Parameter, cut_layout
from paramserver.protocol.messages import CheckpointPiece, CheckpointStored, PartReport, WorkerReport
from paramserver.router.leases import LeaseCut

LAYOUT = cut_layout([Parameter("a", (5,), "one")])
PEER = b"peer"


class Cluster:
    """Two workers and two parts that do what their orders say, unless they are told not to."""

    def __init__(self, progress: dict[str, Any] | None = None, first: int = 1, **settings: Any) -> None:
        self.effects: list[Effect] = []
        self.cuts = Cuts("job", CheckpointSettings(**settings), self.effects, progress or {}, first)
        self.now = 100.0
        self.steps = 0
        self.hindrance = ""
        self.made = 0
        self.workers = {name: self._session(name, 1) for name in ("worker-0", "worker-1")}
        self.own = {"worker-0": b"own of 0", "worker-1": b""}
        self.parts = {"shard-0": PartReport("shard-0", "job"), "shard-1": PartReport("shard-1", "job")}
        self.placed = {"shard-0": ("shard-0", 3), "shard-1": ("shard-1", 4)}

    @staticmethod
    def _session(name: str, incarnation: int) -> Session:
        session = Session(name, "worker", incarnation, PEER, "", "", 1, 0.0, 0.0)
        session.report = WorkerReport(job="job", stage="train")
        return session

    def manifest(self, number: int) -> Manifest:
        self.made += 1
        return Manifest(FORMAT, "job", number, "", "{}", LAYOUT, "", {"train": 9}, LeaseCut(2, 2), {}, {}, ())

    def advance(self, seconds: float = 0.0) -> None:
        self.now += seconds
        workers = list(self.workers.values())
        self.cuts.advance(workers, self.parts, self.placed, self.steps, self.hindrance, self.manifest, self.now)

    def stop(self, name: str, number: int) -> None:
        size = len(self.own[name])
        self.workers[name].report = WorkerReport(job="job", checkpoint=number, checkpoint_bytes=size)

    def go_on(self, name: str) -> None:
        self.workers[name].report = WorkerReport(job="job", stage="train")

    def copy(self, part: str, number: int) -> None:
        self.parts[part] = PartReport(part, "job", checkpoint=number)

    def send(self, part: str, data: bytes, offset: int = 0, total: int | None = None, **changes: Any) -> bool:
        """A piece of a part's file; of a worker's where the name is one. Returns whether it was the next."""
        name, incarnation = self.placed.get(part, (part, 1))
        fields = {
            "name": name,
            "incarnation": incarnation,
            "job": "job",
            "checkpoint": self.cuts.number,
            "part": part if part in self.placed else "",
            "offset": offset,
            "total": len(data) if total is None else total,
            **changes,
        }
        return self.cuts.take(PEER, CheckpointPiece(**fields), memoryview(data), self.now)

    def take(self, kind: type) -> list[Any]:
        found = [effect for effect in self.effects if isinstance(effect, kind)]
        self.effects[:] = [effect for effect in self.effects if not isinstance(effect, kind)]
        return found

    def stored(self) -> int:
        """What the last answer says."""
        message = self.take(Send)[-1].message
        assert isinstance(message, CheckpointStored)
        return message.stored

    def copied(self) -> int:
        """A checkpoint of which all is copied, and nothing stored."""
        number = self.cuts.request()
        self.advance()
        for name in self.workers:
            self.stop(name, number)
        self.advance()
        for part in self.parts:
            self.copy(part, number)
        self.advance(0.5)
        assert self.cuts.phase == "storing"
        return number


def test_workers_stop_first_then_parts_copy_then_training_goes_on_and_the_files_come_in() -> None:
    cluster = Cluster()
    cuts = cluster.cuts
    cluster.advance()
    assert (cuts.for_workers, cuts.for_parts) == (0, 0)
    assert cuts.request() == 1
    cluster.advance()
    assert (cuts.for_workers, cuts.for_parts) == (1, 0)
    assert cuts.has_changed, "its number is stored before anybody hears of it"
    assert cuts.request() == 1, "one that is being taken is as good"
    cluster.stop("worker-0", 1)
    cluster.advance()
    assert (cuts.for_workers, cuts.for_parts, cluster.made) == (1, 0, 0)
    cluster.stop("worker-1", 1)
    cluster.advance()
    assert (cuts.for_workers, cuts.for_parts, cluster.made) == (1, 1, 1)
    cluster.copy("shard-0", 1)
    cluster.advance(0.5)
    assert (cuts.for_workers, cuts.for_parts) == (1, 1)
    cluster.copy("shard-1", 1)
    cluster.advance(0.25)
    assert (cuts.for_workers, cuts.for_parts, cuts.pause_seconds) == (0, 1, 0.75)
    for name in cluster.workers:
        cluster.go_on(name)
    assert cluster.send("shard-0", b"part ", total=10)
    assert cluster.stored() == 5
    assert cluster.send("shard-0", b"zero!", offset=5, total=10)
    assert cluster.send("worker-0", b"own of 0")
    cluster.advance()
    assert cuts.phase == "storing"
    assert cluster.send("shard-1", b"part one")
    cluster.advance()
    (seal,) = cluster.take(SealCheckpoint)
    assert [(file.kind, file.name, file.bytes, file.checksum) for file in seal.manifest.files] == [
        ("part", "shard-0", 10, zlib.crc32(b"part zero!")),
        ("part", "shard-1", 8, zlib.crc32(b"part one")),
        ("worker", "worker-0", 8, zlib.crc32(b"own of 0")),
    ]
    pieces = [(piece.file, piece.offset, bytes(piece.data)) for piece in cluster.take(StorePiece)]
    files = {file.name: file.file for file in seal.manifest.files}
    assert pieces[:2] == [(files["shard-0"], 0, b"part "), (files["shard-0"], 5, b"zero!")]
    assert len(set(files.values())) == 3
    assert cuts.taken == []
    cuts.sealed(1)
    assert (cuts.taken, cuts.phase, cuts.number) == ([1], "", 0)
    assert cuts.request() == 2


def test_a_worker_that_does_not_stop_in_time_costs_the_checkpoint_and_is_named() -> None:
    cluster = Cluster()
    cluster.cuts.request()
    cluster.advance()
    cluster.stop("worker-0", 1)
    cluster.advance(CUT_SECONDS)
    assert cluster.cuts.for_workers == 1
    cluster.advance(0.1)
    assert cluster.cuts.for_workers == 0
    assert cluster.cuts.reason == "checkpoint 1 was given up: worker-1 did not stop and copy within 10 s"
    assert [effect.number for effect in cluster.take(DropCheckpoint)] == [1]
    assert cluster.cuts.given_up == 1
    cluster.advance(100.0)
    assert cluster.cuts.phase == "", "the one that was asked for is over"


def test_a_part_that_does_not_copy_in_time_costs_the_checkpoint_and_is_named() -> None:
    cluster = Cluster()
    number = cluster.cuts.request()
    cluster.advance()
    for name in cluster.workers:
        cluster.stop(name, number)
    cluster.advance(CUT_SECONDS - 1)
    cluster.copy("shard-1", number)
    cluster.advance(1.1)
    assert "shard-0 did not stop and copy" in cluster.cuts.reason


@pytest.mark.parametrize("phase", ["gathering", "copying"])
@pytest.mark.parametrize("fault", ["dies", "restarts", "goes on", "moves", "training ends"])
def test_whatever_would_spoil_the_cut_gives_it_up(phase: str, fault: str) -> None:
    cluster = Cluster()
    number = cluster.cuts.request()
    cluster.advance()
    cluster.stop("worker-0", number)
    if phase == "copying":
        cluster.stop("worker-1", number)
        cluster.advance()
    assert cluster.cuts.phase == phase
    match fault:
        case "dies":
            del cluster.workers["worker-1"]
        case "restarts":
            cluster.workers["worker-1"] = cluster._session("worker-1", 2)
            cluster.stop("worker-1", number)
        case "goes on" if phase == "copying":
            cluster.go_on("worker-0")
        case "goes on":
            cluster.go_on("worker-0")
            cluster.advance()
            assert cluster.cuts.phase == "gathering", "it is waited for again"
            return
        case "moves":
            cluster.placed["shard-1"] = ("shard-1", 5)
        case "training ends":
            cluster.hindrance = "training ended"
    for part in cluster.parts:
        cluster.copy(part, number)
    cluster.advance()
    assert cluster.cuts.phase == ""
    assert cluster.cuts.given_up == 1
    assert cluster.cuts.for_workers == cluster.cuts.for_parts == 0


def test_a_worker_that_joins_while_others_stop_stops_too() -> None:
    cluster = Cluster()
    number = cluster.cuts.request()
    cluster.advance()
    for name in cluster.workers:
        cluster.stop(name, number)
    cluster.workers["worker-2"] = cluster._session("worker-2", 1)
    cluster.own["worker-2"] = b""
    cluster.advance()
    assert cluster.cuts.phase == "gathering"
    cluster.stop("worker-2", number)
    cluster.advance()
    assert cluster.cuts.phase == "copying"


def test_a_successor_of_a_part_cannot_add_a_later_state_to_the_file_of_an_earlier_one() -> None:
    cluster = Cluster()
    cluster.copied()
    assert cluster.send("shard-0", b"half", total=8)
    assert cluster.stored() == 4
    assert cluster.send("shard-0", b"late", offset=4, total=8, incarnation=9)
    assert cluster.stored() == 8, "told that it may forget it"
    assert len(cluster.take(StorePiece)) == 1
    cluster.placed["shard-0"] = ("shard-0", 9)
    cluster.advance()
    assert "shard-0 moved before its copy was stored" in cluster.cuts.reason


def test_files_that_stay_away_cost_the_checkpoint() -> None:
    cluster = Cluster()
    cluster.copied()
    cluster.advance(STALL_SECONDS - 1)
    assert cluster.send("shard-0", b"x", total=8)
    cluster.advance(STALL_SECONDS)
    assert cluster.cuts.phase == "storing", "every piece gives the next one time"
    cluster.advance(0.1)
    assert "nothing came of shard-0, shard-1, worker-0" in cluster.cuts.reason


@pytest.mark.parametrize(("offset", "total", "data"), [(5, 8, b"x"), (0, 9, b"x"), (4, 8, b"12345"), (4, 8, b"")])
def test_a_piece_that_is_not_the_next_one_is_not_stored_and_the_answer_says_what_is(
    offset: int, total: int, data: bytes
) -> None:
    cluster = Cluster()
    cluster.copied()
    cluster.send("shard-0", b"half", total=8)
    cluster.effects.clear()
    assert not cluster.send("shard-0", data, offset=offset, total=total)
    assert cluster.stored() == 4
    assert cluster.take(StorePiece) == []


def test_pieces_of_a_checkpoint_that_is_over_are_told_to_be_forgotten() -> None:
    cluster = Cluster()
    cluster.copied()
    cluster.cuts.give_up("the disk is full", cluster.now)
    cluster.effects.clear()
    assert cluster.send("shard-0", b"half", total=8, checkpoint=1)
    assert cluster.stored() == 8
    assert cluster.take(StorePiece) == []


def test_seconds_and_steps_take_checkpoints_by_themselves() -> None:
    by_seconds, by_steps = Cluster(every_seconds=60), Cluster(every_steps=500)
    for cluster in (by_seconds, by_steps):
        cluster.advance()
    by_seconds.advance(59.9)
    assert by_seconds.cuts.phase == ""
    by_seconds.advance(0.1)
    assert by_seconds.cuts.phase == "gathering"
    by_steps.steps = 499
    by_steps.advance(1e4)
    assert by_steps.cuts.phase == ""
    by_steps.steps = 500
    by_steps.advance()
    assert by_steps.cuts.phase == "gathering"


def test_after_one_that_was_given_up_the_next_waits_a_little() -> None:
    cluster = Cluster(every_steps=10)
    cluster.advance()
    cluster.steps = 10
    cluster.advance()
    cluster.cuts.give_up("for a test", cluster.now)
    cluster.advance(AGAIN_SECONDS - 0.1)
    assert cluster.cuts.phase == ""
    cluster.advance(0.1)
    assert (cluster.cuts.phase, cluster.cuts.number) == ("gathering", 2)


def test_a_successor_of_the_coordinator_uses_no_number_again() -> None:
    cluster = Cluster(first=8)
    cluster.copied()
    assert cluster.cuts.number == 8
    successor = Cluster(progress=cluster.cuts.progress(), first=8)
    assert successor.cuts.phase == "", "nobody knows what the workers did meanwhile"
    assert successor.cuts.request() == 9


def test_a_report_about_another_job_is_no_stop() -> None:
    cluster = Cluster()
    number = cluster.cuts.request()
    cluster.advance()
    cluster.stop("worker-0", number)
    cluster.workers["worker-1"].report = WorkerReport(job="other", checkpoint=number)
    cluster.advance()
    assert cluster.cuts.phase == "gathering"
