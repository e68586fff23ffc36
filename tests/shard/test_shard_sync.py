"""`sync` with a quorum over several shards: whatever comes late where, nobody waits for ever."""

from __future__ import annotations

import random

import numpy as np
import pytest

from paramserver.encoding import make_encoding
from paramserver.job import Job
from paramserver.protocol.layout import Block
from paramserver.shard.block import HeldBlock
from paramserver.shard.consistency import make_policy
from paramserver.shard.optimizers import make_optimizer

STEPS = 6
FRAME = np.ones(1, np.float32).view(np.uint8)


class Cluster:
    """Shards of one block each, and workers that push to all of them and go on when they may pull from all."""

    def __init__(self, seed: int, workers: int, quorum: int, shards: int) -> None:
        self.chance = random.Random(seed)
        job = Job.model_validate(
            {
                "name": "job",
                "model": {"family": "recurrent", "args": {"task": "char-lm"}},
                "cluster": {"workers": workers},
                "consistency": {"mode": "sync", "quorum": quorum},
            }
        )
        self.fp32, optimizer = make_encoding("fp32"), make_optimizer(job.optimizer)
        self.applied = [0] * shards
        self.blocks = [HeldBlock(Block(0, "a", 0, 1, "a"), optimizer) for _ in range(shards)]
        self.policies = [make_policy(job, lambda *_, shard=shard: self.count(shard)) for shard in range(shards)]
        self.names = [f"w{number}" for number in range(workers)]
        self.left = dict.fromkeys(self.names, STEPS)
        self.on_its_way: dict[str, list[int]] = {name: [] for name in self.names}
        self.tell()

    def count(self, shard: int) -> None:
        self.applied[shard] += 1

    def tell(self) -> None:
        """Workers that have nothing left to do are no members."""
        for policy in self.policies:
            policy.set_members([name for name, left in self.left.items() if left])

    def may_go_on(self, name: str) -> bool:
        return not self.on_its_way[name] and all(policy.may_pull(name, (0,)) for policy in self.policies)

    def run(self) -> None:
        while any(self.left.values()) or any(self.on_its_way.values()):
            busy = [name for name in self.names if self.on_its_way[name]]
            free = [name for name in self.names if self.left[name] and self.may_go_on(name)]
            assert busy or free, f"all wait: {self.left} steps are left, {self.applied} rounds closed"
            name = self.chance.choice(busy + free)
            if name in busy:
                shard = self.on_its_way[name].pop()
                self.policies[shard].absorb(self.blocks[shard], name, self.fp32, FRAME, 0)
            else:
                self.left[name] -= 1
                self.on_its_way[name] = self.chance.sample(range(len(self.policies)), len(self.policies))
            # A worker leaves when its last step is answered, or at once where its process dies.
            if not self.left[name] and not self.on_its_way[name]:
                self.tell()
        for policy in self.policies:
            policy.set_members([])
            assert policy.pending_updates == 0


@pytest.mark.parametrize(
    ("workers", "quorum", "shards"), [(3, 2, 3), (3, 2, 2), (4, 3, 5), (5, 2, 4), (3, 3, 3), (4, 1, 2)]
)
def test_late_pushes_at_different_shards_never_make_all_workers_wait(workers: int, quorum: int, shards: int) -> None:
    for seed in range(150):
        try:
            Cluster(seed, workers, quorum, shards).run()
        except AssertionError as error:
            pytest.fail(f"seed {seed}: {error}")


def test_a_worker_whose_push_came_in_time_waits_for_its_round_and_a_late_one_does_not() -> None:
    cluster = Cluster(0, workers=3, quorum=2, shards=1)
    (policy,), (block,) = cluster.policies, cluster.blocks
    policy.absorb(block, "w0", cluster.fp32, FRAME, 0)
    assert not policy.may_pull("w0", (0,))
    policy.absorb(block, "w1", cluster.fp32, FRAME, 0)
    assert cluster.applied == [1]
    assert policy.may_pull("w0", (0,))
    policy.absorb(block, "w2", cluster.fp32, FRAME, 0)
    assert policy.pending_updates == 1, "it is not thrown away"
    assert policy.may_pull("w2", (0,)), "its own round is over"
    policy.absorb(block, "w0", cluster.fp32, FRAME, 0)
    assert cluster.applied == [2]
    policy.absorb(block, "w2", cluster.fp32, FRAME, 0)
    assert policy.may_pull("w2", (0,)), "it is a round behind still"
