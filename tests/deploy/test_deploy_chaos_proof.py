"""The accounting sees every update that is missing or there twice, and proves nothing where it cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from deploy.chaos.copies import AuditError, Journal, Piece, Stream, Updates, merge
from deploy.chaos.journals import JournalTap
from deploy.chaos.proof import Noted, prove, read_accounts
from paramserver.account import Account
from paramserver.protocol.messages import BlockUpdate
from paramserver.shard.journal.records import Pushed, Ticked
from paramserver.shard.journal.segments import LogReader, SegmentLog
from paramserver.shard.journal.storage import OsFolder

FIRST, SECOND = Stream("w0", 1, 0), Stream("w0", 2, 0)  # a worker, and its successor
OTHER = Stream("w1", 1, 1)


def _journal(applied: Mapping[Stream, int]) -> Journal:
    updates: Counter[int] = Counter()
    for stream, sequence in applied.items():
        updates[stream.block] += sequence
    return Journal(dict(applied), updates)


def _noted(last: Mapping[Stream, int]) -> Noted:
    return Noted(dict(last), sum(last.values()), {})


APPLIED = {FIRST: 10, SECOND: 5, OTHER: 7}


def test_what_agrees_is_clean_over_all_incarnations() -> None:
    proof = prove(_noted(APPLIED), [_journal(APPLIED)], {0: 15, 1: 7})
    assert (proof.acknowledged, proof.applied, proof.lost, proof.doubled) == (22, 22, 0, 0)
    assert proof.is_clean
    assert proof.reasons == ()


def test_an_update_that_was_applied_and_not_acknowledged_is_neither_lost_nor_doubled() -> None:
    proof = prove(_noted({FIRST: 9, OTHER: 7}), [_journal(APPLIED)], {0: 15, 1: 7})
    assert proof.is_clean
    assert (proof.acknowledged, proof.applied) == (16, 22)


def test_an_acknowledged_update_that_no_journal_holds_is_lost() -> None:
    proof = prove(_noted(APPLIED | {FIRST: 11}), [_journal(APPLIED)], {0: 15, 1: 7})
    assert (proof.lost, proof.doubled) == (1, 0)
    assert "11 were acknowledged, 10 are in the journal" in proof.reasons[0]


def test_a_stream_that_no_journal_knows_is_lost_as_a_whole() -> None:
    proof = prove(_noted(APPLIED | {Stream("w9", 1, 1): 3}), [_journal(APPLIED)], {0: 15, 1: 7})
    assert (proof.lost, proof.doubled) == (3, 0)


def test_a_version_above_its_updates_is_doubled_and_one_below_is_lost() -> None:
    assert prove(_noted(APPLIED), [_journal(APPLIED)], {0: 16, 1: 7}).doubled == 1
    assert prove(_noted(APPLIED), [_journal(APPLIED)], {0: 14, 1: 7}).lost == 1
    assert prove(_noted(APPLIED), [_journal(APPLIED)], {0: 15}).lost == 7
    both = prove(_noted(APPLIED), [_journal(APPLIED)], {0: 17, 1: 6})
    assert (both.lost, both.doubled) == (1, 2), "they do not balance each other"


def test_a_record_that_is_there_twice_is_doubled_and_a_missing_one_is_lost() -> None:
    journal = Journal()
    for sequence in (1, 2, 2, 3):
        journal.take(((FIRST, sequence),))
    assert prove(_noted({FIRST: 3}), [journal], {0: 4}).doubled == 1
    assert len(journal.out_of_order) == 1
    journal = Journal()
    for sequence in (1, 2, 4):
        journal.take(((FIRST, sequence),))
    proof = prove(_noted({FIRST: 4}), [journal], {0: 3})
    assert (proof.lost, proof.doubled) == (1, 0)
    assert "update 4 instead of 3" in proof.reasons[0]


def test_blocks_of_several_journals_are_added_and_one_block_in_two_proves_nothing() -> None:
    parts = [_journal({FIRST: 10, SECOND: 5}), _journal({OTHER: 7})]
    assert prove(_noted(APPLIED), parts, {0: 15, 1: 7}).is_clean
    with pytest.raises(AuditError, match="in two journals"):
        prove(_noted(APPLIED), [_journal(APPLIED), _journal({OTHER: 7})], {0: 15, 1: 7})


def _pushed(sequence: int, block: int = 0, worker: str = "w0", incarnation: int = 1) -> Pushed:
    return Pushed(worker, incarnation, sequence, False, (BlockUpdate(block, sequence, 0, "fp32"),), (4,), ())


class Log:
    """A journal as a shard writes it: records, new segments, and old ones removed."""

    def __init__(self, state: Path) -> None:
        self.path = state / "shard-0" / "job" / "part"
        self._folder = OsFolder(self.path)
        self._open()

    def _open(self) -> None:
        reader = LogReader(self._folder, 0)
        assert list(reader) == []
        self._log = SegmentLog(reader, must_sync=False)

    def push(self, *sequences: int) -> None:
        for sequence in sequences:
            self._log.append(_pushed(sequence), [np.zeros(4, np.uint8)])
        assert self._log.commit()

    def roll(self) -> None:
        assert self._log.roll()

    def drop_old(self) -> None:
        self._log.remove_before(self._log.number + 1)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "state")


@pytest.fixture
def tap(tmp_path: Path) -> JournalTap:
    return JournalTap(tmp_path / "state", "job", tmp_path / "kept")


def test_the_tap_counts_every_update_although_the_shard_removes_segments(log: Log, tap: JournalTap) -> None:
    for start in range(1, 40, 10):
        log.push(*range(start, start + 10))
        tap.look()
        log.roll()
        tap.look()
        log.drop_old()
        tap.look()
    assert len(list(log.path.glob("segment-*"))) == 1
    ((journal, folder),) = tap.finish().values()
    assert folder == log.path
    assert journal.applied == {FIRST: 40}
    assert journal.updates == {0: 40}
    assert journal.out_of_order == []
    assert not [path for path in (log.path.parents[2] / "kept").rglob("*") if path.is_file()]


def test_what_is_still_written_to_is_not_read_before_the_end(log: Log, tap: JournalTap) -> None:
    log.push(1, 2)
    tap.look()
    log.push(3)
    assert [journal.applied for journal, _ in tap.finish().values()] == [{FIRST: 3}]


def test_a_segment_that_was_missed_is_told(log: Log, tap: JournalTap) -> None:
    log.push(1, 2)
    log.roll()
    log.drop_old()
    log.push(3)
    with pytest.raises(AuditError, match="look more often"):
        tap.finish()


def test_a_segment_that_was_given_up_without_a_record_and_made_again_is_read_once(log: Log, tap: JournalTap) -> None:
    log.push(1)
    log.roll()
    tap.look()
    empty = max(log.path.glob("segment-*"))
    content = empty.read_bytes()
    empty.unlink()  # as a shard does that is started again
    empty.write_bytes(content)
    tap.look()
    log._log._file = log._folder.append(empty.name)
    log.push(2)
    assert [journal.applied for journal, _ in tap.finish().values()] == [{FIRST: 2}]


def test_a_damaged_segment_proves_nothing(log: Log, tap: JournalTap) -> None:
    log.push(1)
    log.push(2)
    (segment,) = log.path.glob("segment-*")
    content = bytearray(segment.read_bytes())
    content[30] ^= 1
    segment.write_bytes(content)
    with pytest.raises(AuditError, match="damaged"):
        tap.finish()


def test_records_without_updates_count_for_nothing(log: Log, tap: JournalTap) -> None:
    log._log.append(Ticked("w0", 1), [])
    log.push(1)
    assert [journal.updates for journal, _ in tap.finish().values()] == [{0: 1}]


PRIMARY, BACKUP = Path("shard-0"), Path("shard-1")


def _piece(folder: Path, first: int, sequences: list[int], terms: Mapping[int, int] | None = None) -> Piece:
    """A record for each sequence, 0 for one without an update; `terms` by the record's number."""
    updates: list[Updates] = [((FIRST, sequence),) if sequence else () for sequence in sequences]
    return Piece(folder, first, updates, [(terms or {}).get(first + place, 0) for place in range(len(sequences))])


def test_copies_of_a_journal_count_once_wherever_they_are_cut() -> None:
    primary = [_piece(PRIMARY, 1, [0, 1, 2], {1: 1}), _piece(PRIMARY, 4, [3, 4])]
    backup = [_piece(BACKUP, 3, [2, 3])]  # it began with a snapshot of the first two records, and is a little behind
    journal, folder = merge("part", [*backup, *primary])
    assert journal.applied == {FIRST: 4}
    assert journal.updates == {0: 4}
    assert folder == PRIMARY


def test_what_a_fenced_primary_alone_had_counts_for_nothing() -> None:
    primary = _piece(PRIMARY, 1, [0, 1, 2, 3, 4, 5], {1: 1})
    backup = _piece(BACKUP, 1, [0, 1, 2, 0, 3, 4], {1: 1, 4: 2})
    journal, folder = merge("part", [primary, backup])
    assert folder == BACKUP
    assert journal.applied == {FIRST: 4}
    assert journal.out_of_order == []


def test_a_primary_that_comes_back_as_the_backup_goes_on_under_the_new_term() -> None:
    pieces = [
        _piece(PRIMARY, 1, [0, 1, 2, 3], {1: 1}),
        _piece(BACKUP, 1, [0, 1, 0, 2], {1: 1, 3: 2}),
        _piece(PRIMARY, 5, [3, 4]),  # from a snapshot of the other's fourth record; nothing in it says the term
        _piece(BACKUP, 5, [3, 4, 5]),
    ]
    journal, folder = merge("part", pieces)
    assert (journal.applied, folder) == ({FIRST: 5}, BACKUP)


def test_a_record_that_no_copy_has_proves_nothing() -> None:
    with pytest.raises(AuditError, match="record 3 of term 1 is in no copy"):
        merge("part", [_piece(PRIMARY, 1, [0, 1], {1: 1}), _piece(PRIMARY, 4, [3, 4])])
    with pytest.raises(AuditError, match="record 4 of term 2 is in no copy"):
        # The first one's fourth record is no substitute: it was given up.
        merge(
            "part", [_piece(PRIMARY, 1, [0, 1, 2, 3], {1: 1}), _piece(BACKUP, 3, [0], {3: 2}), _piece(BACKUP, 5, [4])]
        )


def test_copies_that_do_not_agree_prove_nothing() -> None:
    with pytest.raises(AuditError, match="do not agree"):
        merge("part", [_piece(PRIMARY, 1, [0, 1, 2], {1: 1}), _piece(BACKUP, 1, [0, 1, 3], {1: 1})])


def test_accounts_are_read_by_incarnation_with_their_last_steps(tmp_path: Path) -> None:
    for incarnation, steps in ((1, 3), (2, 2)):
        account = Account(tmp_path, "job", "w0", incarnation)
        for step in range(1, steps + 1):
            account.note(0, step, step)
        account.close()
    noted = read_accounts(tmp_path, "job")
    assert noted.last == {FIRST: 3, SECOND: 2}
    assert noted.steps == {("w0", 1): 3, ("w0", 2): 2}
    assert noted.entries == 5


def test_an_account_may_miss_an_update_and_may_not_repeat_one(tmp_path: Path) -> None:
    account = Account(tmp_path, "job", "w0", 1)
    account.note(0, 1, 1)
    account.note(0, 3, 3)
    assert read_accounts(tmp_path, "job").last == {FIRST: 3}
    account.note(0, 3, 3)
    with pytest.raises(AuditError, match="notes update 3 after 3"):
        read_accounts(tmp_path, "job")
