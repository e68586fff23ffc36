"""A journal reviewed after the fact is the state that the shard had, at its end and at every record on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from journal_rig import Rig, digest_of

from paramserver.cli.errors import FailedError
from paramserver.cli.replay import find_journals
from paramserver.shard.core import ShardCore
from paramserver.shard.journal import keeper, review, segments
from paramserver.shard.journal.keeper import open_journal
from paramserver.shard.journal.layout import JournalError
from paramserver.shard.journal.review import Move
from paramserver.shard.journal.storage import OsFolder

SETTINGS: dict[str, dict[str, Any]] = {
    "published": {"push": {"encoding": "int4"}, "pull": {"encoding": "ternary"}},
    "sync": {
        "push": {"encoding": "int8"},
        "pull": {"encoding": "fp32"},
        "consistency": {"mode": "sync", "quorum": 2},
    },
    "damped": {
        "push": {"encoding": "int8"},
        "pull": {"encoding": "fp32", "fresh": True},
        "consistency": {"mode": "async", "damping": "inverse"},
    },
}


def ran(path: Path, settings: dict[str, Any], steps: int = 40) -> Rig:
    """A shard that lived without a crash, and its journal in real files."""
    rig = Rig(3, "journal", **settings)
    rig.start()
    for _ in range(steps):
        rig.act()
    rig.end()
    path.mkdir()
    for name in rig.folder.names():
        (path / name).write_bytes(rig.folder.read(name))
    return rig


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_review_ends_in_the_state_of_the_shard_and_tells_every_step_of_an_optimiser(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rig = ran(tmp_path / "shard-0", settings)
    assert rig.core.serving is not None
    moves: list[Move] = []
    found = review.review(tmp_path / "shard-0", moves.append)
    assert digest_of(found.serving) == digest_of(rig.core.serving)
    assert (found.first, found.last, found.is_this_build) == (1, rig.journal.number, True)
    versions = [block.version for block in rig.core.serving.blocks.values()]
    assert [sum(move.block == block for move in moves) for block in range(len(versions))] == versions
    assert [move.record for move in moves] == sorted(move.record for move in moves)
    assert max(move.staleness for move in moves) > 0
    assert all(move.distance > 0 for move in moves)
    assert {move.parameter for move in moves} == {"a", "b"}
    if "damping" in settings.get("consistency", {}):
        assert min(move.lr_factor for move in moves) < 1


def test_a_review_stops_after_any_record_in_the_state_that_it_led_to(tmp_path: Path) -> None:
    rig = ran(tmp_path / "shard-0", SETTINGS["published"])
    for until in (2, rig.journal.number // 2, rig.journal.number - 1):
        found = review.review(tmp_path / "shard-0", until=until)
        assert digest_of(found.serving) == rig.digests[until]
    with pytest.raises(JournalError, match=f"its last record is {rig.journal.number}, not 100000"):
        review.review(tmp_path / "shard-0", until=100_000)


def test_the_largest_move_is_the_one_that_was_largest(tmp_path: Path) -> None:
    """Told by the weights themselves, one record at a time."""
    rig = ran(tmp_path / "shard-0", SETTINGS["damped"], steps=15)
    moves: list[Move] = []
    review.review(tmp_path / "shard-0", moves.append)
    move = max(moves, key=lambda move: move.relative)
    before = review.review(tmp_path / "shard-0", until=move.record - 1).serving.blocks[move.block].weights
    after = review.review(tmp_path / "shard-0", until=move.record).serving.blocks[move.block].weights
    distance = float(((after - before) ** 2).sum() ** 0.5)
    assert move.distance == pytest.approx(distance, rel=1e-5)
    assert move.relative == pytest.approx(distance / float((before**2).sum() ** 0.5), rel=1e-5)
    assert rig.core.serving is not None


@pytest.mark.parametrize("keep", ["needed", "all"])
def test_what_a_snapshot_has_replaced_is_there_only_where_all_is_kept(
    keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "SNAPSHOT_BYTES", 1000)
    monkeypatch.setattr(keeper, "SNAPSHOT_RATIO", 1)
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1500)
    rig = ran(tmp_path / "shard-0", SETTINGS["published"] | {"durability": {"log": "journal", "keep": keep}}, 120)
    assert rig.snapshots > 2
    assert rig.core.serving is not None
    found = review.review(tmp_path / "shard-0")
    assert digest_of(found.serving) == digest_of(rig.core.serving)
    if keep == "all":
        assert found.first == 1
        assert digest_of(review.review(tmp_path / "shard-0", until=5).serving) == rig.digests[5]
    else:
        assert found.first > 5
        with pytest.raises(JournalError, match=r"record 5 is older than the snapshot.*durability\.keep 'all'"):
            review.review(tmp_path / "shard-0", until=5)


def test_a_journal_of_another_build_is_reviewed_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran(tmp_path / "shard-0", SETTINGS["published"])
    monkeypatch.setattr(review, "this_build", lambda: "another build")
    assert not review.review(tmp_path / "shard-0").is_this_build


def test_a_journal_that_a_shard_holds_is_not_reviewed_and_a_review_changes_nothing(tmp_path: Path) -> None:
    ran(tmp_path / "shard-0", SETTINGS["published"])
    files = {path.name: path.read_bytes() for path in (tmp_path / "shard-0").iterdir()}
    held = OsFolder(tmp_path / "shard-0")
    with pytest.raises(BlockingIOError):
        review.review(tmp_path / "shard-0")
    held.close()
    torn = tmp_path / "shard-0" / max(files)
    torn.write_bytes(files[torn.name] + b"PSJr torn")
    review.review(tmp_path / "shard-0")
    assert torn.read_bytes() == files[torn.name] + b"PSJr torn", "a review cuts nothing"


def test_of_two_journals_of_a_part_the_one_under_the_later_term_is_newer(tmp_path: Path) -> None:
    rig = ran(tmp_path / "old", SETTINGS["published"])
    folder = OsFolder(tmp_path / "new")
    serving, journal = open_journal(folder, rig.order)
    core = ShardCore("shard-0")
    core.adopt(serving)
    core.take_order(msgspec.structs.replace(rig.order, term=2))
    assert journal.commit()
    journal.close()
    assert review.last_of(tmp_path / "old") == (1, rig.journal.number)
    assert review.last_of(tmp_path / "new") == (2, 2)
    assert max(review.last_of(path) for path in (tmp_path / "old", tmp_path / "new")) == (2, 2)


def test_of_two_copies_of_a_part_the_one_with_more_of_its_past_is_reviewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1500)
    run = tmp_path / "job"
    run.mkdir()
    whole, short = (tmp_path / "state" / shard / "job" / "shard-0" for shard in ("shard-0", "shard-1"))
    for path in (whole, short):
        path.parent.mkdir(parents=True)
        rig = ran(path, SETTINGS["published"])
    assert rig.core.serving is not None
    rig.journal.snapshot(rig.core.serving)
    for name in rig.folder.names():
        (short / name).write_bytes(rig.folder.read(name))
    for path in short.iterdir():
        if path.name not in rig.folder.names():
            path.unlink()
    assert review.last_of(short) == review.last_of(whole)
    assert review.review(short).first > review.review(whole).first == 1
    assert find_journals(run, tmp_path / "state") == {"shard-0": whole}


def test_a_stale_journal_does_not_stand_in_for_the_one_that_a_shard_holds(tmp_path: Path) -> None:
    run = tmp_path / "job"
    run.mkdir()
    for shard, steps in (("shard-0", 5), ("shard-1", 20)):
        (tmp_path / "state" / shard / "job").mkdir(parents=True)
        ran(tmp_path / "state" / shard / "job" / "shard-0", SETTINGS["published"], steps)
    later = tmp_path / "state" / "shard-1" / "job" / "shard-0"
    assert find_journals(run, tmp_path / "state") == {"shard-0": later}
    holder = OsFolder(later)
    with pytest.raises(FailedError, match="a shard holds this journal"):
        find_journals(run, tmp_path / "state")
    holder.close()


def test_a_folder_without_a_record_is_no_journal(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="it is no journal"):
        review.review(tmp_path)
