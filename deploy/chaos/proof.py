"""Whether every acknowledged update was applied, and none twice: three independent counts, compared.

- what workers noted when it was acknowledged to them (paramserver/account.py), also those that were killed;
- what the shards' journals ever held (journals.py), all copies of each taken together (copies.py);
- the versions of the blocks in the state that the journals end with: an update raises its block's version by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.chaos.copies import AuditError, Journal, Stream
from deploy.chaos.journals import JournalTap, final_versions
from paramserver.account import Acknowledged, account_files, read_account

MOST_EXAMPLES = 10  # of what is wrong, quoted


@dataclass(frozen=True)
class Proof:
    """In updates of a block. `reasons` says where lost and doubled ones are; few of many."""

    acknowledged: int
    applied: int
    lost: int
    doubled: int
    reasons: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.doubled)


@dataclass
class Noted:
    """What the workers' accounts say."""

    last: dict[Stream, int]  # sequence of the last acknowledged update
    entries: int
    steps: dict[tuple[str, int], int]  # the last step of each (worker, incarnation)


def read_accounts(folder: Path, job: str) -> Noted:
    """Raises AuditError where an account notes an update twice, OSError."""
    noted = Noted({}, 0, {})
    for (worker, incarnation), path in account_files(folder, job).items():
        _take(noted, worker, incarnation, read_account(path))
    return noted


def _take(noted: Noted, worker: str, incarnation: int, entries: Iterable[Acknowledged]) -> None:
    for entry in entries:
        stream = Stream(worker, incarnation, entry.block)
        # A gap is no fault: a worker that takes its job up again may never hear what became of its last update.
        if entry.sequence <= (last := noted.last.get(stream, 0)):
            raise AuditError(f"the account of {stream} notes update {entry.sequence} after {last}")
        noted.last[stream] = entry.sequence
        noted.entries += 1
        key = worker, incarnation
        noted.steps[key] = max(noted.steps.get(key, 0), entry.step)


def prove(noted: Noted, journals: Iterable[Journal], versions: Mapping[int, int]) -> Proof:
    """Compare the three.

    Args:
        journals: of the parts, each with blocks of its own.
        versions: by block, as the journals' states end.

    Raises AuditError where a block is in two journals: then it takes more than counting.
    """
    applied: dict[Stream, int] = {}
    updates: Counter[int] = Counter()
    reasons: list[str] = []
    doubled, lost = 0, 0
    for journal in journals:
        if both := updates.keys() & journal.updates.keys():
            raise AuditError(f"blocks {sorted(both)} are in two journals: which of them counts is not known")
        applied.update(journal.applied)
        updates.update(journal.updates)
        reasons += journal.out_of_order
    for stream, sequence in noted.last.items():
        if (missing := sequence - applied.get(stream, 0)) > 0:
            lost += missing
            reasons.append(f"{stream}: {sequence} were acknowledged, {applied.get(stream, 0)} are in the journal")
    # A sequence has no gaps, so its last number is how many updates there should be.
    expected: Counter[int] = Counter()
    for stream, sequence in applied.items():
        expected[stream.block] += sequence
    for block in sorted(versions.keys() | updates.keys()):
        held, version = updates[block] - expected[block], versions.get(block, 0) - expected[block]
        doubled += max(0, held, version)
        lost += max(0, -held, -version)
        if held or version:
            reasons.append(
                f"block {block}: {expected[block]} updates by their sequences, {updates[block]} in the journal, "
                f"its version is {versions.get(block, 0)}"
            )
    return Proof(noted.entries, sum(updates.values()), lost, doubled, tuple(reasons[:MOST_EXAMPLES]))


def prove_files(accounts: Path, job: str, tap: JournalTap) -> tuple[Proof, Noted]:
    """The same of what a cluster has left. Call when none of its processes lives. Raises AuditError, OSError."""
    parts = tap.finish()
    versions: dict[int, int] = {}
    for _, folder in parts.values():
        versions |= final_versions(folder)
    noted = read_accounts(accounts, job)
    return prove(noted, [journal for journal, _ in parts.values()], versions), noted
