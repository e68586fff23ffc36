"""Where the cluster uses keys, a shard hears only the live workers that the coordinator names, each with its key."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_shard_core import LAYOUT, SPECIFICATION

from paramserver.protocol.messages import (
    Hello,
    Initialise,
    Initialised,
    Message,
    PartOrder,
    Pull,
    Pulled,
    Refusal,
    Want,
    Welcome,
    WorkerKey,
)
from paramserver.shard.core import ShardCore


def order(*workers: WorkerKey, term: int = 1) -> PartOrder:
    return PartOrder(
        part="shard-0",
        job="job",
        specification=json.dumps(SPECIFICATION),
        term=term,
        phase=0,
        layout=LAYOUT,
        blocks=(0, 1),
        workers=workers,
    )


@pytest.fixture
def core() -> ShardCore:
    made = ShardCore("shard-0", key_of=lambda peer: peer.decode().rpartition("/")[2])
    made.take_order(order(WorkerKey("w0", 3, "K0"), WorkerKey("w1", 1, "K1")))
    return made


def say(core: ShardCore, peer: str, message: Message, frames: list[memoryview] | None = None) -> Message:
    (reply,) = core.handle(peer.encode(), message, frames or [])
    return reply.message


def hello(worker: str, incarnation: int) -> Hello:
    return Hello(worker=worker, incarnation=incarnation, job="job", layout=LAYOUT.fingerprint, part="shard-0")


INITIALISE = Initialise(request=1, job="job", term=1, layout=LAYOUT.fingerprint, blocks=(0, 1))
FRAMES = [memoryview(np.zeros(block.elements, np.float32).tobytes()) for block in LAYOUT.blocks]


def pull(worker: str, incarnation: int) -> Pull:
    wants = (Want(0),)
    return Pull(request=2, job="job", term=1, worker=worker, incarnation=incarnation, step=0, wants=wants)


def code(answer: Message) -> str:
    assert isinstance(answer, Refusal), answer
    return answer.code


def test_live_worker_with_its_key_is_served(core: ShardCore) -> None:
    assert isinstance(say(core, "a/K0", hello("w0", 3)), Welcome)
    assert isinstance(say(core, "a/K0", INITIALISE, FRAMES), Initialised)
    assert isinstance(say(core, "a/K0", pull("w0", 3)), Pulled)
    assert not core.refusals


@pytest.mark.parametrize(
    ("peer", "worker", "incarnation"),
    [("b/K1", "w0", 3), ("b/K1", "w0", 99), ("b/K9", "w0", 3), ("b/K0", "w0", 4), ("b/K0", "w0", 2), ("b/K1", "w9", 1)],
)
def test_another_key_name_or_incarnation_is_refused_and_drives_nobody_out(
    core: ShardCore, peer: str, worker: str, incarnation: int
) -> None:
    say(core, "a/K0", hello("w0", 3))
    say(core, "a/K0", INITIALISE, FRAMES)
    assert code(say(core, peer, hello(worker, incarnation))) == "wrong-key"
    assert code(say(core, peer, pull("w0", 3))) == "unknown-worker"
    assert core.refusals["wrong-key"] == 1
    assert isinstance(say(core, "a/K0", pull("w0", 3)), Pulled)


def test_first_values_come_only_from_who_has_said_hello(core: ShardCore) -> None:
    assert code(say(core, "b/K1", INITIALISE, FRAMES)) == "unknown-worker"
    assert core.serving is not None
    assert not core.serving.blocks[0].is_initialised


def test_successor_is_heard_once_the_coordinator_names_it(core: ShardCore) -> None:
    say(core, "a/K0", hello("w0", 3))
    assert code(say(core, "c/K2", hello("w0", 4))) == "wrong-key"
    core.take_order(order(WorkerKey("w0", 4, "K2")))
    assert isinstance(say(core, "c/K2", hello("w0", 4)), Welcome)
    assert code(say(core, "a/K0", hello("w0", 3))) == "wrong-key"


def test_without_keys_everybody_may_say_hello() -> None:
    core = ShardCore("shard-0")
    core.take_order(order())
    assert isinstance(say(core, "a", hello("w0", 3)), Welcome)
