"""A part's file holds all of its state, block by block, and any part can be made of the blocks of any files."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from journal_rig import BLOCKS, LAYOUT, Rig, digest_of, make_order
from msgspec import structs

from paramserver.protocol.messages import CheckpointPiece, CheckpointStored, KeptBlock, Member, TakeBlock
from paramserver.protocol.pieces import AGAIN_SECONDS
from paramserver.shard.checkpoint import BEFORE, blocks_of, named, parse_head, part_file, restore_block, take_block
from paramserver.shard.core import ShardCore
from paramserver.shard.duties import CheckpointDuty
from paramserver.shard.journal.keeper import open_journal
from paramserver.shard.journal.memory import MemoryFolder
from paramserver.shard.journal.replay import kept
from paramserver.shard.serving import Serving

SETTINGS: list[dict[str, Any]] = [
    {"push": {"encoding": "int4"}, "pull": {"encoding": "ternary"}, "optimizer": {"name": "adam"}},
    {"push": {"encoding": "int8"}, "pull": {"encoding": "fp32"}, "consistency": {"mode": "sync"}},
    {"push": {"encoding": "int4"}, "pull": {"encoding": "coded"}, "consistency": {"mode": "bounded", "slack": 2}},
]


def trained(settings: dict[str, Any]) -> Serving:
    """A part after some seeded pushes, in the middle of whatever its policy does."""
    rig = Rig(5, "journal", **settings)
    rig.start()
    for _ in range(60):
        rig.act()
    assert rig.core.serving is not None
    while "sync" in str(settings) and not rig.core.serving.policy.pending_updates:
        rig.act()
    assert rig.core.serving.telemetry.updates > 10
    rig.core.serving.journal = None
    return rig.core.serving


def fresh(serving: Serving, blocks: tuple[int, ...], job: str = "job-2") -> Serving:
    """A part of a resumed run that holds these blocks, and no value yet."""
    order = structs.replace(serving.order, job=job, blocks=blocks, members=(), resumes=True)
    return Serving(order)


def opened(file: bytes) -> tuple[dict[str, np.ndarray], Any]:
    size = int.from_bytes(file[:8], "little")
    arrays, part = parse_head(file[8 : 8 + size])
    values = safetensors.numpy.load(file)
    assert values.keys() == arrays.keys()
    return values, part


def blocks_in(file: bytes) -> dict[int, tuple[str, list[str], list[memoryview]]]:
    """What the coordinator sends of each block."""
    arrays, part = opened(file)
    return {
        index: (
            msgspec.json.encode(block).decode(),
            named(index, arrays),
            [memoryview(arrays[name].tobytes()) for name in named(index, arrays)],
        )
        for index, block in blocks_of(part.state).items()
    }


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_part_that_takes_every_block_of_a_file_is_the_part_that_was_kept(settings: dict[str, Any]) -> None:
    serving = trained(settings)
    assert bool(serving.policy.pending_updates) == ("sync" in str(settings)), "an open round is part of the state"
    other = fresh(serving, tuple(BLOCKS))
    for state, names, frames in blocks_in(part_file("shard-0", *kept(serving))).values():
        take_block(other, state, names, frames)
    (before, arrays), (after, restored) = kept(serving), kept(other)
    assert restored.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(restored[name], array)
    assert after.telemetry == before.telemetry
    assert after.publishing.replicas == before.publishing.replicas
    assert sorted(after.publishing.steps) == sorted(before.publishing.steps)
    assert after.policy.rounds == before.policy.rounds
    for old, new in zip(before.blocks, after.blocks, strict=True):
        assert (new.version, new.first_values) == (old.version, old.first_values)
        assert new.marks == {worker: (BEFORE, sequence) for worker, (_, sequence) in old.marks.items()}


def test_counters_of_a_part_that_is_cut_in_two_add_up_to_what_they_were() -> None:
    serving = trained(SETTINGS[0])
    blocks = blocks_in(part_file("shard-0", *kept(serving)))
    parts = [fresh(serving, (0,)), fresh(serving, (1,))]
    for part, index in zip(parts, BLOCKS, strict=True):
        take_block(part, *blocks[index])
    assert sum(part.telemetry.updates for part in parts) == serving.telemetry.updates
    assert sum(part.telemetry.pushes for part in parts) == serving.telemetry.pushes


def test_a_copy_does_not_change_with_what_comes_after_it() -> None:
    serving = trained(SETTINGS[0])
    file = part_file("shard-0", *kept(serving))
    weights = serving.blocks[0].weights.copy()
    serving.blocks[0].weights += 1
    np.testing.assert_array_equal(opened(file)[0]["0.weights"], weights)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_restart_replays_the_blocks_that_were_taken_from_a_checkpoint(settings: dict[str, Any]) -> None:
    source = trained(settings)
    order = structs.replace(make_order("journal", **settings), job="job-2", resumes=True)
    folder = MemoryFolder()
    serving, journal = open_journal(folder, order, in_background=False)
    for block in blocks_in(part_file("shard-0", *kept(source))).values():
        take_block(serving, *block)
    assert journal.commit()
    digest = digest_of(serving)
    journal.close()
    again, second = open_journal(folder, order, in_background=False)
    second.close()
    assert digest_of(again) == digest


def test_a_new_process_of_a_known_name_begins_its_sequence_at_one() -> None:
    serving = trained(SETTINGS[0])
    other = fresh(serving, tuple(BLOCKS))
    for block in blocks_in(part_file("shard-0", *kept(serving))).values():
        take_block(other, *block)
    marks = other.blocks[0].marks
    assert marks.as_dict()["w0"] == (0, serving.blocks[0].marks.as_dict()["w0"][1])
    assert marks.expected("w0", 1) == 1


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda names, frames: (names[1:], frames[1:]), "comes with the arrays"),
        (lambda names, frames: (names, [frame[:-8] for frame in frames]), "elements"),
        (lambda names, frames: (names, [frame[:-1] for frame in frames]), "buffer size"),
    ],
)
def test_a_block_that_is_not_whole_is_refused_and_changes_nothing(spoil: Any, says: str) -> None:
    serving = trained(SETTINGS[0])
    other = fresh(serving, tuple(BLOCKS))
    before = digest_of(other)
    state, names, frames = blocks_in(part_file("shard-0", *kept(serving)))[1]
    with pytest.raises(ValueError, match=says):
        take_block(other, state, *spoil(names, frames))
    assert digest_of(other) == before


def test_a_block_that_has_a_value_takes_no_other() -> None:
    serving = trained(SETTINGS[0])
    arrays, part = opened(part_file("shard-0", *kept(serving)))
    own = {name: arrays[name] for name in named(0, arrays)}
    with pytest.raises(ValueError, match="has a value already"):
        restore_block(serving, blocks_of(part.state)[0], own)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- duties


def core_of(serving: Serving) -> ShardCore:
    core = ShardCore("shard-0")
    core.adopt(serving)
    return core


def order(core: ShardCore, **changes: Any) -> None:
    assert core.serving is not None
    core.take_order(structs.replace(core.serving.order, **changes))


def test_the_state_is_copied_when_the_order_comes_and_sent_until_it_is_stored() -> None:
    core, duty = core_of(trained(SETTINGS[0])), CheckpointDuty("shard-0")
    duty.follow(core.serving)
    assert (duty.number, duty.due(core.serving, "shard-0", 1, 0.0)) == (0, [])
    order(core, checkpoint=4)
    duty.follow(core.serving)
    assert duty.number == 4
    assert core.serving is not None
    expected = part_file("shard-0", *kept(core.serving))
    core.serving.blocks[0].weights += 1
    ((piece, frames),) = duty.due(core.serving, "shard-0", 1, 0.0)
    assert isinstance(piece, CheckpointPiece)
    assert (piece.checkpoint, piece.part, piece.offset, piece.total) == (4, "shard-0", 0, len(expected))
    assert bytes(frames[0]) == expected
    assert duty.due(core.serving, "shard-0", 1, 0.1) == [], "one piece at a time"
    assert duty.due(core.serving, "shard-0", 1, AGAIN_SECONDS) != [], "and again without an answer"
    stored = CheckpointStored(job="job", checkpoint=4, part="shard-0", stored=len(expected))
    duty.hear(core.serving, stored, [])
    assert duty.due(core.serving, "shard-0", 1, 1e9) == []
    order(core, checkpoint=0)
    duty.follow(core.serving)
    assert duty.number == 0


def test_a_copy_that_is_not_wanted_any_more_is_forgotten() -> None:
    core, duty = core_of(trained(SETTINGS[0])), CheckpointDuty("shard-0")
    order(core, checkpoint=4)
    duty.follow(core.serving)
    order(core, checkpoint=0)
    duty.follow(core.serving)
    assert duty.due(core.serving, "shard-0", 1, 1e9) == []


def test_blocks_without_a_value_are_asked_for_until_they_have_come() -> None:
    source = trained(SETTINGS[0])
    blocks = blocks_in(part_file("shard-0", *kept(source)))
    core, duty = core_of(fresh(source, tuple(BLOCKS), job="job")), CheckpointDuty("shard-0")
    duty.follow(core.serving)
    asked = [
        message.block for message, _ in duty.due(core.serving, "shard-0", 1, 0.0) if isinstance(message, TakeBlock)
    ]
    assert asked == [0, 1]
    assert duty.due(core.serving, "shard-0", 1, 0.1) == []
    assert len(duty.due(core.serving, "shard-0", 1, AGAIN_SECONDS)) == 2
    for index in (1, 0, 0):  # the last one is a second answer
        state, names, frames = blocks[index]
        kept_block = KeptBlock(job="job", part="shard-0", block=index, state=state, arrays=tuple(names))
        told = duty.hear(core.serving, kept_block, frames)
    assert not told
    assert core.serving is not None
    assert all(block.is_initialised for block in core.serving.blocks.values())
    assert core.serving.telemetry.updates == source.telemetry.updates
    assert duty.due(core.serving, "shard-0", 1, 1e9) == []


def test_blocks_of_another_job_are_told_as_the_parts_failure_and_not_asked_for_again() -> None:
    source = trained(SETTINGS[0])
    state, names, frames = blocks_in(part_file("shard-0", *kept(source)))[0]
    specification = json.loads(source.order.specification)
    specification["optimizer"] = {"name": "sgd"}
    other = structs.replace(fresh(source, (0,)).order, specification=json.dumps(specification))
    serving, duty = Serving(other), CheckpointDuty("shard-0")
    duty.follow(serving)
    message = KeptBlock(job="job-2", part="shard-0", block=0, state=state, arrays=tuple(names))
    assert duty.hear(serving, message, frames)
    assert "cannot go on from the checkpoint" in duty.failure
    assert duty.due(serving, "shard-0", 1, 1e9) == []
    assert not serving.blocks[0].is_initialised


def test_the_members_of_the_run_before_are_nobody_in_the_new_one() -> None:
    source = trained(SETTINGS[2])
    source.policy.set_members(["w0", "w1"])
    other = fresh(source, tuple(BLOCKS))
    for block in blocks_in(part_file("shard-0", *kept(source))).values():
        take_block(other, *block)
    assert other.policy.members == frozenset()
    other.follow(structs.replace(other.order, members=(Member("w9", 1),)))
    assert other.policy.may_pull("w9", [0])
    assert LAYOUT.fingerprint == other.fingerprint
