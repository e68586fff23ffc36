"""Adaptive pushes through the exchange: planned over all blocks, nothing lost of what is held back."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
import torch
from worker_rig import SHAPES, Rig, make_gradients, total

from paramserver.protocol.memory import MemoryNetwork
from paramserver.protocol.messages import Push
from worker.counters import Counters
from worker.pace import Pace


def held_and_applied(rig: Rig, block: int) -> np.ndarray:
    """What the shard has taken off the weights, and what the worker still holds back."""
    residual = rig.exchange.residuals.find(block)
    return -rig.weights(block) + (0.0 if residual is None else residual)


def test_what_was_sent_and_what_is_held_back_make_what_was_to_be_sent() -> None:
    network = MemoryNetwork(seed=5, drop=0.15, duplicate=0.15, reorder=0.15, delay=(0.0, 0.05))
    rig = Rig("adaptive", network)
    gradients = [rig.step(seed, seed) for seed in range(1, 31)]
    assert network.faults.dropped
    assert network.faults.duplicated
    for block in rig.layout.blocks:
        np.testing.assert_allclose(held_and_applied(rig, block.index), total(gradients, block.parameter), atol=2e-4)
    rig.exchange.flush(31)
    for block in rig.layout.blocks:
        np.testing.assert_allclose(-rig.weights(block.index), total(gradients, block.parameter), atol=2e-4)
    assert rig.exchange.residuals.norm() == 0


def test_a_block_with_little_to_say_waits_and_its_values_are_pulled_all_the_same() -> None:
    rig = Rig("adaptive")
    loud, quiet = "first.weight", "second.weight"
    for step in range(1, 9):
        gradients = make_gradients(step)
        gradients[quiet] = 1e-4 * gradients[quiet]
        rig.exchange.begin(gradients, rig.replica.editions.copy(), step)
        rig.exchange.settle()
    updates = dict.fromkeys(SHAPES, 0)
    for shard in rig.shards:
        for message, _ in shard.pushes():
            assert isinstance(message, Push)
            for update in message.updates:
                updates[rig.layout.blocks[update.block].parameter] += 1
    assert updates[loud] == 8
    assert updates[quiet] < 4, "it is held back, and the bound on how long brings it out now and then"
    quiet_block = next(block.index for block in rig.layout.blocks if block.parameter == quiet)
    np.testing.assert_array_equal(rig.replica.values(quiet_block), rig.weights(quiet_block))


def test_a_step_of_zeros_sends_no_update_of_an_adaptive_block() -> None:
    rig = Rig("adaptive")
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    rig.exchange.begin(zeros, rig.replica.editions.copy(), 1)
    rig.exchange.settle()
    assert rig.updates() == 1, "the bias, which goes at full precision"


@pytest.mark.parametrize(("exchange_seconds", "is_limited"), [(0.5, False), (4.0, True)])
def test_bytes_are_limited_where_exchanges_take_longer_than_the_computation(
    exchange_seconds: float, is_limited: bool
) -> None:
    pace, counters = Pace(1), Counters()
    assert pace.byte_limit(1.0) is None, "nothing is known yet"
    pace.begin(10.0, counters, 1.0)
    counters.push_bytes, counters.pull_bytes = 4000, 1000
    pace.end(10.0 + exchange_seconds, counters, waited_seconds=exchange_seconds)
    limit = pace.byte_limit(1.0)
    assert (limit is not None) == is_limited
    if limit is not None:
        assert limit == pytest.approx(1000)
    assert pace.byte_limit(inf) is None, "nobody says how long an exchange may take"


def test_an_exchange_whose_end_nobody_saw_says_nothing_of_the_wire() -> None:
    pace, counters = Pace(1), Counters()
    pace.begin(10.0, counters, 1.0)
    counters.push_bytes = 4000
    pace.end(14.0, counters, waited_seconds=0.0)
    assert pace.byte_limit(1.0) is None


def test_updates_that_arrive_late_lower_the_limit() -> None:
    limits = []
    for late in (False, True):
        pace, counters = Pace(1), Counters()
        pace.begin(10.0, counters, 1.0)
        counters.push_bytes = 4000
        pace.end(14.0, counters, waited_seconds=4.0)
        version = 1
        for turn in range(200):
            version += 20 if late and turn > 190 else 2
            pace.saw_version(0, version)
        limit = pace.byte_limit(1.0)
        assert limit is not None
        limits.append(limit)
    assert limits[1] < limits[0]
