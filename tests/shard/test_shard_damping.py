"""How much of the learning rate an update gets."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.encoding import make_encoding
from paramserver.job import Job
from paramserver.protocol.layout import Parameter, cut_layout
from paramserver.protocol.messages import BlockUpdate, Hello, Initialise, PartOrder, Push
from paramserver.shard.core import ShardCore
from paramserver.shard.damping import Damping

LAYOUT = cut_layout([Parameter("a", (8, 8), "first")])
ELEMENTS = LAYOUT.blocks[0].elements


def job(**sections: object) -> Job:
    return Job.model_validate({"name": "job", "model": {"family": "recurrent"}, **sections})


@pytest.mark.parametrize(
    ("staleness", "version", "share"),
    [
        (0, 0, 1.0),  # one worker alone trains as one process does
        (1, 1, 2 / 16),
        (7, 7, 8 / 112),  # the last of eight workers' first updates
        (8, 63, 0.5),
        (8, 127, 1.0),
        (8, 10_000, 1.0),
        (300, 310, 311 / 4800),  # one that was away for long
    ],
)
@pytest.mark.parametrize(("where", "settling"), [("server", 16), ("worker", 8)])
def test_a_stale_update_of_a_young_block_gets_a_share_of_the_learning_rate(
    staleness: int, version: int, share: float, where: str, settling: int
) -> None:
    damping = Damping(job(optimizer={"where": where}, consistency={"settling_updates": settling}))
    assert damping.factor(staleness, version) == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize(
    "sections",
    [{"optimizer": {"name": "sgd"}}, {"optimizer": {"name": "momentum"}}, {"consistency": {"settling_updates": 0}}],
)
def test_nothing_settles_where_steps_follow_the_gradients_or_the_job_wants_none(sections: dict[str, object]) -> None:
    assert Damping(job(**sections)).factor(8, 8) == 1.0


def test_settling_and_the_damping_of_a_job_are_both_obeyed() -> None:
    damping = Damping(job(consistency={"damping": "sqrt", "settling_updates": 16}))
    assert damping.factor(3, 11) == pytest.approx(0.5 * 12 / 48)
    assert damping.factor(3, 1000) == 0.5


@given(st.integers(0, 10_000), st.integers(0, 10**6), st.integers(0, 1000))
def test_a_factor_is_a_share_that_grows_with_the_block_and_falls_with_staleness(
    staleness: int, version: int, settling: int
) -> None:
    damping = Damping(job(consistency={"settling_updates": settling}))
    factor = damping.factor(staleness, version)
    assert 0 < factor <= 1
    assert damping.factor(staleness, version + 1) >= factor
    assert damping.factor(staleness + 1, version) <= factor


def test_the_first_updates_of_many_workers_move_the_weights_by_little_more_than_one_does() -> None:
    moved = {}
    for settling in (16, 0):
        core = ShardCore("shard-0")
        specification = {
            "name": "job",
            "model": {"family": "recurrent"},
            "push": {"encoding": "fp32"},
            "pull": {"encoding": "fp32"},
            "optimizer": {"name": "adagrad", "lr": 1.0},
            "consistency": {"settling_updates": settling},
        }
        core.take_order(PartOrder("shard-0", "job", json.dumps(specification), 1, 0, LAYOUT, (0,)))
        first = Initialise(request=1, job="job", term=1, layout=LAYOUT.fingerprint, blocks=(0,))
        core.handle(b"w0", first, [memoryview(bytes(4 * ELEMENTS))])
        frame = np.empty(4 * ELEMENTS, np.uint8)
        make_encoding("fp32").encode(np.full(ELEMENTS, 1e-3, np.float32), frame)
        for number in range(8):  # each computed on the first values
            name = f"w{number}"
            core.handle(
                name.encode(),
                Hello(worker=name, incarnation=1, job="job", layout=LAYOUT.fingerprint, part="shard-0"),
                [],
            )
            head = {"request": 2, "job": "job", "term": 1, "worker": name, "incarnation": 1, "step": 1}
            core.handle(name.encode(), Push(**head, updates=(BlockUpdate(0, 1, 0, "fp32"),)), [memoryview(frame)])  # type: ignore[arg-type]
        assert core.serving is not None
        assert core.serving.blocks[0].version == 8
        moved[settling] = -float(core.serving.blocks[0].weights[0])
    assert moved[0] > 4.3  # the sum of 1 / sqrt(k) over eight is 4.37
    assert 1 <= moved[16] < 1.5
