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
from worker.pace import CONVINCING, REMEMBERED, Pace


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


def observe(pace: Pace, seconds: float, pushed: int, pulled: int, computing_seconds: float = 1.0) -> None:
    """One exchange that is waited for to its end."""
    counters = Counters()
    pace.begin(10.0, counters, computing_seconds)
    counters.push_bytes, counters.pull_bytes = pushed, pulled
    pace.end(10.0 + seconds, counters, waited_seconds=seconds)


def test_a_step_may_push_what_the_wire_carries_while_it_computes() -> None:
    pace = Pace(1)
    for _ in range(CONVINCING):
        assert pace.byte_limit(1.0) is None, "one exchange or two may be slow by chance"
        observe(pace, seconds=4.0, pushed=4000, pulled=1000)
    assert pace.byte_limit(2.0) == pytest.approx(2000)
    assert pace.byte_limit(0.0) == pytest.approx(1000), "what comes in takes as long"
    assert pace.byte_limit(inf) is None, "nobody says how long an exchange may take"


def test_where_exchanges_are_short_nothing_is_limited() -> None:
    pace = Pace(1)
    for _ in range(10):
        observe(pace, seconds=0.6, pushed=100, pulled=100)  # what an answer takes, whatever the bytes
    assert pace.byte_limit(0.1) is None
    assert pace.byte_limit(1.0) is None
    for _ in range(CONVINCING):
        observe(pace, seconds=4.0, pushed=4000, pulled=1000)
    assert pace.byte_limit(1.0) is not None
    for _ in range(3 * REMEMBERED):
        observe(pace, seconds=0.4, pushed=1000, pulled=1000)
    assert pace.byte_limit(1.0) is None, "twice as much would be quick, too"


def test_an_exchange_whose_end_nobody_saw_says_nothing_of_the_wire() -> None:
    pace, counters = Pace(1), Counters()
    for _ in range(10):
        pace.begin(10.0, counters, 1.0)
        counters.push_bytes += 4000
        pace.end(14.0, counters, waited_seconds=0.0)
    assert pace.byte_limit(1.0) is None


def test_updates_that_arrive_late_lower_the_limit() -> None:
    limits = []
    for late in (False, True):
        pace = Pace(1)
        for _ in range(CONVINCING):
            observe(pace, seconds=4.0, pushed=4000, pulled=0)
        version = 1
        for turn in range(200):
            version += 20 if late and turn > 190 else 2
            pace.saw_version(0, version)
        limit = pace.byte_limit(1.0)
        assert limit is not None
        limits.append(limit)
    assert limits[1] < limits[0]


@pytest.mark.parametrize(
    ("seconds", "pushed", "pulled", "is_slow"),
    [(2.0, 1000, 2000, True), (2.0, 2000, 1000, False), (0.9, 1000, 2000, False)],
)
def test_pulls_are_slow_where_exchanges_are_and_more_comes_than_goes(
    seconds: float, pushed: int, pulled: int, is_slow: bool
) -> None:
    pace = Pace(1)
    for _ in range(CONVINCING - 1):
        observe(pace, seconds, pushed, pulled)
    assert not pace.is_pull_slow, "one exchange or two may be slow by chance"
    observe(pace, seconds, pushed, pulled)
    assert pace.is_pull_slow == is_slow


def test_pulls_stay_slow_until_twice_as_much_would_be_quick() -> None:
    pace = Pace(1)
    for _ in range(CONVINCING):
        observe(pace, 2.0, 1000, 2000)
    for _ in range(3 * REMEMBERED):
        observe(pace, 0.9, 1000, 1000)  # what half as much takes
    assert pace.is_pull_slow
    for _ in range(3 * REMEMBERED):
        observe(pace, 0.4, 1000, 1000)
    assert not pace.is_pull_slow


def test_pulls_that_bring_two_deltas_now_and_none_then_are_slow_all_the_same() -> None:
    pace = Pace(1)
    for _ in range(10):
        observe(pace, 2.0, 1000, 3000)
        observe(pace, 2.0, 1000, 0)
    assert pace.is_pull_slow


def test_a_computation_of_unknown_length_finds_nothing_slow() -> None:
    pace = Pace(1)
    for _ in range(10):
        observe(pace, 2.0, 1000, 3000, computing_seconds=inf)
    assert not pace.is_pull_slow
    for _ in range(CONVINCING):
        observe(pace, 2.0, 1000, 3000)
    assert pace.is_pull_slow, "and it does not count for later ones"
