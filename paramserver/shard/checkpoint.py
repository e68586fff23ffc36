"""What a part keeps in a checkpoint, and blocks that go on from one.

A part's file is a safetensors file: the arrays of `journal/states.py` by name, and in its metadata, under "state", the
rest as JSON. Blocks are numbered by the layout, so a part may be made of the blocks of any files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from msgspec import Struct, structs

from paramserver.shard.journal.records import Restored
from paramserver.shard.journal.snapshot import file_head
from paramserver.shard.journal.states import (
    Arrays,
    BlockState,
    PublishingState,
    ReplicaState,
    RoundState,
    State,
    TelemetryState,
)
from paramserver.shard.serving import Serving

BEFORE = 0
"""The incarnation under which a resumed job knows all workers of the run before: no process ever has it."""

DTYPES: dict[str, type[np.float32] | type[np.int64]] = {"F32": np.float32, "I64": np.int64}


class KeptBlockState(Struct, frozen=True):
    """What is kept of one block, but for its arrays.

    `telemetry` is that of the part that held it, told with the first of the part's blocks only: counters add up.
    """

    block: BlockState
    replica: ReplicaState | None = None
    step: tuple[int, int, float] | None = None  # of `coded`: see PublishingState
    round: RoundState | None = None
    telemetry: TelemetryState | None = None


class KeptPart(Struct, frozen=True):
    """The state of a part as its file has it."""

    part: str
    state: State


def part_file(part: str, state: State, arrays: Arrays) -> bytes:
    """The file of a part as it is now: a copy."""
    metadata = {"state": msgspec.json.encode(KeptPart(part, state)).decode()}
    bodies = [array.data.cast("B") for array in arrays.values() if array.size]
    return b"".join([file_head(arrays, metadata), *bodies])


def blocks_of(state: State) -> dict[int, KeptBlockState]:
    """A part's state by block."""
    replicas = {replica.block: replica for replica in state.publishing.replicas}
    steps = {step[0]: step for step in state.publishing.steps}
    rounds = {kept.block: kept for kept in state.policy.rounds}
    first = min((block.index for block in state.blocks), default=-1)
    return {
        block.index: KeptBlockState(
            block,
            replicas.get(block.index),
            steps.get(block.index),
            rounds.get(block.index),
            state.telemetry if block.index == first else None,
        )
        for block in state.blocks
    }


def named(index: int, arrays: Mapping[str, object]) -> list[str]:
    """The names of a block's arrays, as a part's file has them."""
    return sorted(name for name in arrays if name.partition(".")[0] == str(index))


def decode_block(state: str, arrays: Sequence[str], frames: Sequence[memoryview]) -> tuple[KeptBlockState, Arrays]:
    """What a message or a record says of a block; arrays are copied. Raises ValueError for what is none."""
    block = msgspec.json.decode(state, type=KeptBlockState)
    values: Arrays = {}
    for name, frame in zip(arrays, frames, strict=True):
        content = bytes(frame)
        is_versions = name.endswith(".versions")
        values[name] = np.frombuffer(content, np.int64) if is_versions else np.frombuffer(content, np.float32)
    return block, values


def take_block(serving: Serving, state: str, arrays: Sequence[str], frames: Sequence[memoryview]) -> int:
    """Let a block go on from what the coordinator sent of it, and write that down. Returns its index.

    Raises ValueError, and nothing has changed then.
    """
    block, values = decode_block(state, arrays, frames)
    restore_block(serving, block, values)
    bodies = [np.frombuffer(frame, np.uint8) for frame in frames]
    sizes = tuple([body.size for body in bodies])
    serving.note(Restored(block.block.index, state, tuple(arrays), sizes), bodies)
    return block.block.index


def check_block(serving: Serving, block: KeptBlockState, arrays: Arrays) -> None:
    """Raise ValueError where this is not the whole of a block that is held here."""
    index = block.block.index
    held = serving.blocks.get(index)
    if held is None:
        raise ValueError(f"block {index} is not held here")
    wanted = {f"{index}.weights", *(f"{index}.state{slot}" for slot in range(len(held.state)))}
    wanted |= {f"{index}.published", f"{index}.versions"} if block.replica is not None else set()
    wanted |= {f"{index}.round"} if block.round is not None else set()
    if arrays.keys() != wanted:
        raise ValueError(f"block {index} comes with the arrays {sorted(arrays)}, wanted are {sorted(wanted)}")
    if (block.replica is None) != serving.job.pull.is_fresh:
        raise ValueError(f"block {index} was kept under the other kind of pull")
    for name, array in arrays.items():
        if not name.endswith(".versions") and array.size != held.elements:
            raise ValueError(f"array {name!r} has {array.size} elements, the block has {held.elements}")


def restore_block(serving: Serving, block: KeptBlockState, arrays: Arrays) -> None:
    """Let a block that has no value yet go on from a checkpoint.

    Its watermarks stay, but as those of incarnation 0: every process of the new run counts from 1, and none of the old
    run can speak to a job of another id. Raises ValueError, and nothing has changed then.
    """
    check_block(serving, block, arrays)
    index = block.block.index
    if serving.blocks[index].is_initialised:
        raise ValueError(f"block {index} has a value already")
    marks = {worker: (BEFORE, sequence) for worker, (_, sequence) in block.block.marks.items()}
    serving.blocks[index].restore(structs.replace(block.block, marks=marks), arrays)
    replicas = () if block.replica is None else (block.replica,)
    steps = () if block.step is None else (block.step,)
    serving.publishing.restore(PublishingState(replicas, steps), arrays, serving.blocks)
    if block.round is not None:
        serving.policy.restore_round(block.round, arrays, serving.blocks)
    if block.telemetry is not None:
        serving.telemetry.add(block.telemetry)


def parse_head(head: bytes) -> tuple[dict[str, tuple[str, int, int]], KeptPart]:
    """The arrays (name -> type, first byte, end) and the state in the head of a part's file. Raises ValueError."""
    entries = json.loads(head)
    if not isinstance(entries, dict):
        raise ValueError("its head is no mapping")
    metadata = entries.pop("__metadata__", {})
    arrays = {}
    for name, entry in entries.items():
        first, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES or not 0 <= first <= end:
            raise ValueError(f"array {name!r} has the unknown type or place {entry}")
        arrays[name] = (str(entry["dtype"]), int(first), int(end))
    return arrays, msgspec.json.decode(metadata["state"], type=KeptPart)
