"""The journal's files: what is torn is cut, what is damaged is told with its place, what is full is waited for."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_rig import LAYOUT, Rig, digest_of, make_order

from paramserver.protocol.transport import Buffer
from paramserver.shard.journal import keeper, segments
from paramserver.shard.journal.home import JournalHome
from paramserver.shard.journal.keeper import open_journal
from paramserver.shard.journal.layout import JournalError, SegmentReader, encode_record, preamble
from paramserver.shard.journal.memory import MemoryFolder
from paramserver.shard.journal.records import FirstValues, Ticked
from paramserver.shard.journal.segments import LogReader, SegmentLog, segment_name
from paramserver.shard.journal.storage import OsFolder

PUBLISHED: dict[str, Any] = {"push": {"encoding": "int4"}, "pull": {"encoding": "ternary"}}


def written(numbers: Sequence[int], durable: Callable[[int], int], sizes: Sequence[int]) -> bytes:
    """A segment whose records have frames of these sizes."""
    parts: list[Buffer] = [preamble(numbers[0])]
    for number, size in zip(numbers, sizes, strict=True):
        parts += encode_record(number, durable(number), FirstValues((number,)), [np.full(size, number % 251, np.uint8)])
    return b"".join(parts)


def numbers_in(data: bytes, first: int = 1) -> tuple[list[int], SegmentReader]:
    reader = SegmentReader("segment", data, first)
    return [entry.number for entry in reader], reader


def ends_of(sizes: Sequence[int]) -> list[int]:
    """Where each of the records of `written` ends."""
    return [len(written(range(1, n + 1), lambda number: 0, sizes[:n])) for n in range(1, len(sizes) + 1)]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_a_segment_that_is_cut_anywhere_gives_the_records_before_the_cut(sizes: list[int], data: st.DataObject) -> None:
    whole = written(range(1, len(sizes) + 1), lambda number: number - 1, sizes)
    cut = data.draw(st.integers(0, len(whole)))
    found, reader = numbers_in(whole[:cut])
    assert found == [number for number, end in enumerate(ends_of(sizes), 1) if end <= cut]
    assert reader.is_torn == (reader.end < cut)


@given(st.lists(st.integers(0, 300), min_size=2, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_is_never_read_over(sizes: list[int], data: st.DataObject) -> None:
    """In a record that a later one calls durable it is an error that names the record; else the end is cut there."""
    whole = bytearray(written(range(1, len(sizes) + 1), lambda number: number - 1, sizes))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    hit = next(number for number, end in enumerate(ends_of(sizes), 1) if at < end)
    if hit < len(sizes):
        with pytest.raises(JournalError, match=r"segment: damaged at byte \d+: record \d+ is not readable"):
            numbers_in(bytes(whole))
    else:
        assert numbers_in(bytes(whole))[0] == list(range(1, hit))


def test_records_of_one_commit_that_reached_the_disk_out_of_order_are_a_torn_end() -> None:
    """Nothing after the hole says that what is in the hole was durable: it was not acknowledged."""
    sizes = [80, 80, 80]
    whole = bytearray(written((1, 2, 3), lambda number: 1, sizes))
    first, second = ends_of(sizes)[:2]
    whole[first:second] = bytes(second - first)
    found, reader = numbers_in(bytes(whole))
    assert found == [1]
    assert reader.is_torn


@given(st.binary(max_size=400))
@settings(max_examples=100, deadline=None)
def test_bytes_that_are_no_segment_give_no_record(data: bytes) -> None:
    assert numbers_in(data)[0] == []


def test_a_missing_segment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 200)
    folder = MemoryFolder()
    log = open_log(folder)
    for step in range(30):
        log.append(Ticked("w0", step), ())
        log.commit()
    names = folder.names()
    assert len(names) > 4
    folder.remove(names[2])
    with pytest.raises(JournalError, match="records are missing"):
        open_log(folder)


def test_segments_before_a_snapshot_are_removed_and_those_after_it_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 200)
    folder = MemoryFolder()
    log = open_log(folder)
    for step in range(30):
        log.append(Ticked("w0", step), ())
        log.commit()
    log.remove_before(21)
    reader = LogReader(folder, 20)
    assert [entry.number for entry in reader] == list(range(21, 31))


def open_log(folder: MemoryFolder, must_sync: bool = False) -> SegmentLog:
    reader = LogReader(folder, 0)
    for _ in reader:
        pass
    return SegmentLog(reader, must_sync)


def test_nothing_is_durable_before_the_commit_that_syncs_it() -> None:
    folder = MemoryFolder()
    log = open_log(folder, must_sync=True)
    for size in (10, segments.GATHER_BYTES):
        log.append(FirstValues((0,)), [np.zeros(size, np.uint8)])
        assert not log.is_durable
        assert log.commit()
        assert log.is_durable


def test_a_full_disk_holds_everything_back_until_there_is_room_again() -> None:
    folder = MemoryFolder()
    log = open_log(folder)
    log.append(Ticked("w0", 1), ())
    assert log.commit()
    folder.capacity = sum(len(folder.read(name)) for name in folder.names()) + 20
    log.append(Ticked("w0", 2), ())
    log.append(FirstValues((0,)), [np.ones(segments.GATHER_BYTES, np.uint8)])
    assert not log.commit()
    assert not log.is_durable
    assert "No space left" in log.trouble
    assert not log.commit()
    folder.capacity = None
    assert log.commit()
    assert log.is_durable
    assert log.trouble == ""
    reader = LogReader(folder, 0)
    assert [type(entry.record).__name__ for entry in reader] == ["Ticked", "Ticked", "FirstValues"]


def test_a_sync_that_fails_is_final_because_a_second_one_would_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MemoryFolder()
    log = open_log(folder, must_sync=True)

    def fail(_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr("paramserver.shard.journal.memory.MemoryFile.sync", fail)
        log.append(Ticked("w0", 1), ())
        with pytest.raises(JournalError, match="Input/output error"):
            log.commit()
    with pytest.raises(JournalError, match="a sync has failed before"):
        log.commit()


# ----------------------------------------------------------------------------- recovery


def lived(folder: Any, steps: int = 12, **settings: Any) -> Rig:
    """A shard that served for a while, without faults, and whose process then died."""
    rig = Rig(3, "journal", **{**PUBLISHED, **settings})
    rig.chance = random.Random(3)
    rig.folder = folder
    rig.start()
    for _ in range(steps):
        rig.act()
    assert rig.journal.number > 10
    return rig


def test_a_restart_finds_the_same_bits_in_real_files(tmp_path: Path) -> None:
    folder = OsFolder(tmp_path / "journal")
    rig = lived(folder)
    assert rig.core.serving is not None
    rig.journal.close()
    recovered, journal = open_journal(OsFolder(tmp_path / "journal"), rig.order)
    assert digest_of(recovered) == digest_of(rig.core.serving)
    journal.close()


def test_a_snapshot_is_a_safetensors_file_and_replaces_the_log_before_it(tmp_path: Path) -> None:
    rig = lived(OsFolder(tmp_path / "journal"))
    assert rig.core.serving is not None
    rig.journal.snapshot(rig.core.serving)
    rig.journal.close()  # waits for the thread that makes it durable
    (file,) = (tmp_path / "journal").glob("snapshot-*.safetensors")
    arrays = safetensors.numpy.load_file(file)
    for index, block in rig.core.serving.blocks.items():
        assert np.array_equal(arrays[f"{index}.weights"], block.weights)
    for segment in (tmp_path / "journal").glob("segment-*.log"):
        if segment.name != segment_name(rig.journal.number + 1):
            segment.unlink()  # the loop would have, at its next look
    recovered, journal = open_journal(OsFolder(tmp_path / "journal"), rig.order)
    assert digest_of(recovered) == digest_of(rig.core.serving)
    journal.close()


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_damaged_snapshot_is_told_and_not_taken(suffix: str, tmp_path: Path) -> None:
    rig = lived(OsFolder(tmp_path / "journal"))
    assert rig.core.serving is not None
    rig.journal.snapshot(rig.core.serving)
    rig.journal.close()
    (file,) = (tmp_path / "journal").glob(f"snapshot-*{suffix}")
    content = bytearray(file.read_bytes())
    content[-3 if suffix == ".safetensors" else 0] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(JournalError, match=f"snapshot-.*{suffix}: damaged"):
        open_journal(OsFolder(tmp_path / "journal"), rig.order)


def test_a_snapshot_of_another_format_is_told(tmp_path: Path) -> None:
    rig = lived(OsFolder(tmp_path / "journal"))
    assert rig.core.serving is not None
    rig.journal.snapshot(rig.core.serving)
    rig.journal.close()
    (file,) = (tmp_path / "journal").glob("snapshot-*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(JournalError, match="has format 99, this release knows 1"):
        open_journal(OsFolder(tmp_path / "journal"), rig.order)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"specification": make_order("journal", optimizer={"lr": 0.5}, **PUBLISHED).specification}, "specification"),
        ({"layout": msgspec.structs.replace(LAYOUT, blocks=LAYOUT.blocks[:1])}, "layout"),
        ({"job": "other"}, "job"),
    ],
)
def test_a_journal_of_something_else_is_refused(changes: dict[str, Any], what: str) -> None:
    rig = lived(MemoryFolder())
    with pytest.raises(JournalError, match=f"is the journal of another {what}"):
        open_journal(rig.folder, msgspec.structs.replace(rig.order, **changes))


def test_records_of_another_build_are_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = lived(MemoryFolder())
    monkeypatch.setattr(keeper, "this_build", lambda: "another machine")
    with pytest.raises(JournalError, match="might give other bits"):
        open_journal(rig.folder, rig.order)


def test_a_record_that_does_not_fit_the_state_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the optimiser of the replaying process takes one decision fewer than was written."""
    rig = lived(MemoryFolder())
    monkeypatch.setattr("paramserver.shard.core.Serving._apply", lambda *_: None)
    with pytest.raises(JournalError, match=r"\(Pushed\) does not fit the state before it: \d of its decisions"):
        open_journal(rig.folder, rig.order)


# --------------------------------------------------------------------------- the folders


def test_one_process_holds_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramserver.shard.journal.home.HELD_SECONDS", 0.2)
    home = JournalHome(tmp_path, "shard-0")
    _, journal = home.open(make_order("journal"))
    with pytest.raises(JournalError, match="another process holds this journal"):
        home.open(make_order("journal"))
    journal.close()
    _, again = home.open(make_order("journal"))
    again.close()


def test_the_journal_of_an_earlier_job_of_the_same_id_is_not_gone_on_with(tmp_path: Path) -> None:
    """A coordinator with a fresh store gives ids again, and incarnations: new updates would pass for duplicates."""
    _, journal = JournalHome(tmp_path, "shard-0").open(make_order("journal"))
    journal.commit()
    journal.close()
    begins = make_order("journal")
    assert begins.term == 1
    with pytest.raises(JournalError, match=r"of an earlier job 'job'.*move the folder away"):
        JournalHome(tmp_path, "shard-0").open(begins)
    goes_on = msgspec.structs.replace(begins, term=2)
    _, again = JournalHome(tmp_path, "shard-0").open(goes_on)
    again.close()


def test_only_the_last_job_is_kept(tmp_path: Path) -> None:
    home = JournalHome(tmp_path, "shard-0")
    for job in ("first", "second"):
        _, journal = home.open(msgspec.structs.replace(make_order("journal"), job=job))
        journal.commit()
        journal.close()
    assert os.listdir(tmp_path / "shard-0") == ["second"]


@pytest.mark.parametrize("name", ["..", "a/b", ""])
def test_a_shard_whose_name_is_no_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot be the name of a folder"):
        JournalHome(tmp_path, name)


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "shard-0").write_text("in the way")
    with pytest.raises(JournalError, match="cannot be used for the journal"):
        JournalHome(tmp_path, "shard-0").open(make_order("journal"))
