"""A wire that carries less than the workers compute: what goes out and how often editions come follow it.

Real exchanges and a real shard core, on a network in memory whose links carry so many bytes a second.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import torch

from models.task import Parameter
from paramserver.job import PushSettings
from paramserver.protocol.memory import MemoryNetwork
from paramserver.protocol.messages import PartAddress, PartOrder
from paramserver.protocol.transport import Received
from paramserver.shard.core import ShardCore
from worker.attached import Attached
from worker.client import Identity
from worker.counters import Counters
from worker.exchange import Codec, Exchange
from worker.replica import Replica

ELEMENTS = 65_536
COMPUTING_SECONDS = 0.1
THIN = ELEMENTS / 4  # bytes a second: a fifth of a bit an element while a step computes
ERROR, ERROR_LIMIT = 0.6, 0.8


@dataclass
class Worker:
    """One of several that take turns; its steps compute for COMPUTING_SECONDS each."""

    replica: Replica
    exchange: Exchange
    counters: Counters = field(default_factory=Counters)

    def step(self, number: int, gradient: torch.Tensor) -> int:
        """The bytes of its push."""
        before = self.counters.push_bytes
        self.exchange.begin({"layer": gradient}, self.replica.editions.copy(), number, COMPUTING_SECONDS)
        self.exchange.settle()
        return self.counters.push_bytes - before


class Job:
    """Workers and a shard; each worker's link carries so many bytes a second each way."""

    def __init__(self, bytes_a_second: float, workers: int = 2, **pull: object) -> None:
        self.network = MemoryNetwork(seed=1)
        self.core = ShardCore("shard-0")
        self.listener = self.network.listen("shard-0:0")
        self.network.idle = self.pump
        push = PushSettings(encoding="adaptive", error=ERROR, error_limit=ERROR_LIMIT)
        specification = {
            "name": "job",
            "model": {"family": "recurrent"},
            "push": push.model_dump(mode="json"),
            "pull": {"encoding": "coded", **pull},
            "optimizer": {"name": "sgd", "lr": 0.1},
        }
        layout = Replica([self.parameter()]).layout
        self.core.take_order(
            PartOrder(
                part="shard-0",
                job="job",
                specification=json.dumps(specification),
                term=1,
                phase=0,
                layout=layout,
                blocks=(0,),
            )
        )
        placement = [PartAddress("shard-0", self.listener.address, (0,))]
        codec = Codec(push.encodings(layout), 1000.0, push.error, push.error_limit)
        self.workers: list[Worker] = []
        for number in range(workers):
            replica, counters = Replica([self.parameter()]), Counters()
            identity = Identity("job", f"w{number}", 1, layout.fingerprint)
            exchange = Exchange(
                self.network, placement, identity, replica, codec, counters, clock=lambda: self.network.now
            )
            self.workers.append(Worker(replica, exchange, counters))
        self.workers[0].exchange.initialise()
        for worker in self.workers:
            worker.exchange.pull(0)
        self.network.bytes_a_second = bytes_a_second
        self._random = torch.Generator().manual_seed(2)
        self.sent = torch.zeros(ELEMENTS)

    @staticmethod
    def parameter() -> Parameter:
        return Parameter("layer", torch.zeros(4, ELEMENTS // 4), "")

    def pump(self) -> None:
        while (received := self.listener.receive(0)) is not None:
            assert isinstance(received, Received)
            for reply in self.core.handle(received.peer, received.message, received.frames):
                self.listener.send(reply.peer, reply.message, reply.frames)

    def run(self, steps: int) -> list[list[int]]:
        """The bytes of every push (steps, workers). Segments differ in size, as those of real gradients do."""
        size = torch.logspace(-1, 1, ELEMENTS // 2048).repeat_interleave(2048)
        pushed = []
        for number in range(1, steps + 1):
            row = []
            for worker in self.workers:
                gradient = size * torch.randn(ELEMENTS, generator=self._random)
                self.sent += gradient
                row.append(worker.step(number, gradient.view(4, -1)))
            pushed.append(row)
        return pushed

    @property
    def period(self) -> int:
        assert self.core.serving is not None
        return self.core.serving.publishing.period()

    def residual_share(self) -> float:
        """What all workers hold back, over the root of the squares that they were given in one step."""
        squares = sum(worker.exchange.residuals.norm() ** 2 for worker in self.workers)
        return float(np.sqrt(squares))


def test_a_thin_wire_makes_pushes_smaller_down_to_the_error_limit_and_a_wide_one_does_not() -> None:
    wide, thin = Job(1e9), Job(THIN)
    bytes_wide, bytes_thin = np.array(wide.run(20)), np.array(thin.run(20))
    assert bytes_thin[8:].mean() < 0.7 * bytes_wide[8:].mean()
    # The bound on the error holds, however little the wire carries: the residual is that of a share of 0.64.
    assert wide.residual_share() < thin.residual_share() < 4 * wide.residual_share()
    assert bytes_thin.min() > 0.2 * bytes_wide.mean(), "no step goes to nothing"


def test_editions_come_once_a_worker_step_where_pulls_hold_all_workers_up() -> None:
    wide, thin = Job(1e9), Job(THIN)
    wide.run(20)
    thin.run(20)
    assert wide.period == 1
    assert thin.period == 2
    assert thin.core.serving is not None
    assert wide.core.serving is not None
    assert thin.core.serving.publishing.editions() < 0.65 * wide.core.serving.publishing.editions()


def test_the_period_of_a_job_that_names_one_follows_no_wire() -> None:
    job = Job(THIN, publish_every=1)
    job.run(10)
    assert job.period == 1


def test_nothing_is_lost_on_a_thin_wire() -> None:
    job = Job(THIN)
    job.run(20)
    for worker in job.workers:
        worker.exchange.flush(21)
    assert job.core.serving is not None
    np.testing.assert_allclose(job.core.serving.blocks[0].weights, -0.1 * job.sent.numpy(), rtol=1e-3, atol=1e-3)


def test_a_script_that_computes_longer_may_push_more() -> None:
    pushed = []
    for computing_seconds in (0.0, 3.0):
        job = Job(THIN, workers=1, publish_every=8)
        worker = job.workers[0]
        before = worker.counters.push_bytes  # the first values
        attached = Attached(worker.replica, worker.exchange, worker.counters, None, clock=lambda: job.network.now)  # noqa: B023
        for number in range(20):
            job.network.advance(computing_seconds)
            attached.push({"layer": torch.randn(4, ELEMENTS // 4, generator=torch.Generator().manual_seed(number))})
        pushed.append(worker.counters.push_bytes - before)
    assert pushed[1] > 1.3 * pushed[0]
