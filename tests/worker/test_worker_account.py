"""What a worker notes of its updates is what was acknowledged, each once, and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from worker_rig import SHAPES, Rig, make_gradients

from paramserver.account import ENTRY_BYTES, Account, account_files, read_account
from paramserver.protocol.memory import MemoryNetwork
from paramserver.protocol.messages import Push, Pushed, RefusedUpdate
from paramserver.protocol.transport import Received
from paramserver.shard.core import Reply

STEPS = 20


def _rig(tmp_path: Path, network: MemoryNetwork | None = None) -> tuple[Rig, Path]:
    rig = Rig("int8", network)
    account = Account(tmp_path, "job", "w0", 1)
    for client in rig.exchange._clients:
        client._account = account
    return rig, account_files(tmp_path, "job")["w0", 1]


def test_every_acknowledged_update_is_noted_once_under_drops_duplicates_and_reordering(tmp_path: Path) -> None:
    network = MemoryNetwork(seed=7, drop=0.15, duplicate=0.15, reorder=0.15, delay=(0.0, 0.05))
    rig, path = _rig(tmp_path, network)
    for step in range(1, STEPS + 1):
        rig.step(step, step)
    assert network.faults.dropped
    assert rig.counters.retries
    entries = list(read_account(path))
    assert Counter(entries) == Counter(
        {(block, step, step): 1 for block in range(len(SHAPES)) for step in range(1, STEPS + 1)}
    )


def test_what_is_refused_for_good_or_not_answered_is_not_noted(tmp_path: Path) -> None:
    rig, path = _rig(tmp_path)
    shard = rig.shards[1]

    def refuse(received: Received) -> list[Reply] | None:
        if not isinstance(received.message, Push):
            return None
        update = received.message.updates[0]
        refused = RefusedUpdate(update.block, update.sequence, "malformed", "no")
        return [Reply(received.peer, Pushed(request=received.message.request, acknowledged=(), refused=(refused,)))]

    shard.intercept = refuse
    rig.exchange.begin(make_gradients(1), rig.replica.editions, 1)
    rig.exchange.settle_pushes()
    assert {entry.block for entry in read_account(path)} == {0, 2}


def test_an_update_that_was_applied_before_is_noted_when_the_worker_learns_it(tmp_path: Path) -> None:
    rig, path = _rig(tmp_path)
    rig.step(1, 1)
    shard = rig.shards[1]
    noted = len(list(read_account(path)))

    def applied_before(received: Received) -> list[Reply] | None:
        if not isinstance(received.message, Push):
            return None
        update = received.message.updates[0]
        refused = RefusedUpdate(update.block, update.sequence, "out-of-order", "", expected=update.sequence + 1)
        return [Reply(received.peer, Pushed(request=received.message.request, acknowledged=(), refused=(refused,)))]

    shard.intercept = applied_before
    rig.exchange.begin(make_gradients(1), rig.replica.editions, 2)
    rig.exchange.settle_pushes()
    assert (1, 2, 2) in list(read_account(path))[noted:]


def test_half_an_entry_at_the_end_counts_for_nothing(tmp_path: Path) -> None:
    account = Account(tmp_path, "job", "a.worker", 12)
    account.note(3, 5, 7)
    account.note(4, 5, 8)
    account.close()
    path = account_files(tmp_path, "job")["a.worker", 12]
    path.write_bytes(path.read_bytes()[: ENTRY_BYTES + 3])
    assert list(read_account(path)) == [(3, 5, 7)]


def test_an_account_that_cannot_be_written_ends_the_worker(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("a file in the way")
    with pytest.raises(OSError, match="job"):
        Account(tmp_path, "job", "w0", 1)
