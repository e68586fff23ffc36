"""Published deltas as a worker sees them: over a network with faults its replica is the shard's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from worker_rig import CountingTask, ListedLeases, Rig, make_gradients, make_parameters

from paramserver.encoding import make_encoding
from paramserver.job import OptimizerSettings
from paramserver.protocol.memory import MemoryNetwork
from paramserver.protocol.messages import BlockValue, Lease
from paramserver.shard.publishing import PublishedDeltas
from worker.errors import JobFailure
from worker.local_optimizer import LocalOptimizer
from worker.replica import Replica
from worker.train import Trainer


def published(rig: Rig, block: int) -> tuple[np.ndarray, int]:
    """The value and edition that the shard has published."""
    for shard, held in zip(rig.shards, rig.blocks, strict=True):
        if block in held:
            assert shard.core.serving is not None
            assert isinstance(shard.core.serving.publishing, PublishedDeltas)
            replica = shard.core.serving.publishing.replica(block)
            return replica.values, replica.edition
    raise AssertionError(f"block {block} is nowhere")


def assert_identical(rig: Rig, replica: Replica) -> None:
    for block in rig.layout.blocks:
        values, edition = published(rig, block.index)
        assert replica.editions[block.index] == edition
        np.testing.assert_array_equal(replica.values(block.index).view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("encoding", ["int8", "int4", "fp4", "int2", "ternary", "sign", "topk"])
def test_replicas_are_bit_identical_to_the_published_one_whatever_the_network_does(encoding: str) -> None:
    network = MemoryNetwork(seed=11, drop=0.15, duplicate=0.15, reorder=0.15, delay=(0.0, 0.05))
    rig = Rig("int4", network, pull={"encoding": encoding, "fresh": False})
    other = Replica(make_parameters())
    second = rig.connect("w1", other)
    rig.exchange.pull(0)
    second.pull(0)
    for step in range(1, 25):
        rig.step(step, step)
        if step % 3 == 0:
            second.begin(make_gradients(100 + step), other.editions.copy(), step)
            second.settle()
    rig.exchange.pull(25)
    second.pull(25)
    assert network.faults.dropped
    assert network.faults.duplicated
    assert network.faults.overtaken
    assert_identical(rig, rig.replica)
    assert_identical(rig, other)
    assert published(rig, 0)[1] > 10


def test_weights_are_pulled_whole_and_the_replica_comes_back_after_them() -> None:
    rig = Rig("int4", pull={"encoding": "sign", "publish_every": 100, "fresh": False})
    rig.exchange.pull(0)
    rig.step(1, 1)
    held = [rig.replica.values(block.index).copy() for block in rig.layout.blocks]
    rig.exchange.pull(1, "weights")
    for block in rig.layout.blocks:
        np.testing.assert_array_equal(rig.replica.values(block.index), rig.weights(block.index))
        assert not np.array_equal(held[block.index], rig.weights(block.index))
    rig.exchange.pull(1)
    assert_identical(rig, rig.replica)
    for block in rig.layout.blocks:
        np.testing.assert_array_equal(rig.replica.values(block.index), held[block.index])


def test_deltas_that_do_not_begin_at_what_is_held_change_nothing() -> None:
    replica = Replica(make_parameters())
    encoding = make_encoding("ternary")
    elements = replica.layout.blocks[0].elements
    frame = np.empty(encoding.frame_bytes(elements), np.uint8)
    encoding.encode(np.ones(elements, np.float32), frame)
    assert not replica.apply_deltas(0, 3, encoding.identifier, [frame]), "nothing is held yet"
    replica.editions[0] = 5
    assert not replica.apply_deltas(0, 7, encoding.identifier, [frame]), "edition 6 is missing"
    assert not replica.values(0).any()
    assert replica.apply_deltas(0, 6, encoding.identifier, [frame, frame]), "5 was applied before: only 6 is new"
    assert (replica.values(0) == 1).all()
    assert replica.apply_deltas(0, 6, encoding.identifier, [frame, frame]), "a late copy"
    assert (replica.values(0) == 1).all()
    assert replica.editions[0] == 6


def test_a_damaged_delta_is_refused_whole() -> None:
    rig = Rig(pull={"encoding": "ternary", "fresh": False})
    rig.exchange.pull(0)
    encoding = make_encoding("ternary")
    good = np.zeros(encoding.frame_bytes(rig.layout.blocks[0].elements), np.uint8)
    encoding.encode(np.ones(rig.layout.blocks[0].elements, np.float32), good)
    bad = good.copy()
    bad[-1] = 255  # no five trits
    value = BlockValue(0, 2, "deltas", encoding.identifier, 2)
    assert not rig.exchange.value(value, [memoryview(good), memoryview(bad)])
    assert not rig.replica.values(0).any()
    assert rig.counters.refusals["corrupt-frame"] == 1


def test_a_damaged_coded_delta_is_found_by_decoding_and_mended_by_asking_again() -> None:
    rig = Rig(pull={"encoding": "coded", "fresh": False})
    rig.exchange.pull(0)
    elements = rig.layout.blocks[0].elements
    coded, frames = make_encoding("coded"), []
    expected = np.zeros(elements, np.float32)
    for seed in range(3):
        frame = np.empty(coded.frame_bytes(elements), np.uint8)
        values = np.random.default_rng(seed).normal(size=elements).astype(np.float32)
        frame = frame[: coded.encode(values, frame)]
        coded.decode_add(frame, expected)
        frames.append(frame)
    bad = frames[1].copy()
    bad[-3] ^= 0x55
    value = BlockValue(0, 3, "deltas", coded.identifier, 3)
    assert not rig.exchange.value(value, [memoryview(frame) for frame in (frames[0], bad, frames[2])])
    assert rig.counters.refusals["corrupt-frame"] == 1
    assert rig.replica.editions[0] == 1, "the one before it is in"
    assert rig.exchange.value(value, [memoryview(frame) for frame in frames])
    assert rig.replica.editions[0] == 3
    np.testing.assert_array_equal(rig.replica.values(0).view(np.uint32), expected.view(np.uint32))


def test_weights_that_diverged_fail_the_job_through_deltas_too() -> None:
    rig = Rig(pull={"encoding": "int8", "fresh": False})
    rig.exchange.pull(0)
    gradients = {name: torch.full_like(value, 3e38) for name, value in make_gradients(1).items()}
    rig.exchange.begin(gradients, rig.replica.editions.copy(), 1)
    rig.exchange.settle()
    rig.exchange.begin(gradients, rig.replica.editions.copy(), 2)
    with pytest.raises(JobFailure, match="training has diverged"):
        rig.exchange.settle()


@pytest.mark.parametrize("name", ["adagrad", "adam", "momentum"])
def test_where_worker_pushes_the_step_that_torch_would_take(name: str) -> None:
    settings = {"name": name, "lr": 0.1, "where": "worker"}
    rig = Rig(optimizer=settings)
    rig.exchange.pull(0)
    task = CountingTask()
    source = ListedLeases([Lease(number, "train", examples=(number,)) for number in range(3)])
    optimizer = LocalOptimizer(OptimizerSettings.model_validate(settings), task.parameters())
    trainer = Trainer(task, rig.replica, rig.exchange, source, rig.counters, None, float("inf"), optimizer)
    trainer.run()
    expected = torch.nn.Parameter(torch.zeros(1))
    kinds = {"adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}
    reference = kinds.get(name, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9))([expected], lr=0.1)
    for _ in range(6):
        expected.grad = torch.ones(1)
        reference.step()
    assert rig.updates() == 6 * len(rig.layout.blocks)
    np.testing.assert_allclose(rig.weights(0), np.full_like(rig.weights(0), float(expected.detach())), rtol=1e-5)
