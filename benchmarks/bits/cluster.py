"""Two shard cores and any number of workers' exchanges in one process, as a job on the task would place them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bits.forgetful import ForgetfulDeltas
from models.task import Parameter, Task
from paramserver.coordinator.placement import balance
from paramserver.job import Job
from paramserver.protocol.layout import Layout
from paramserver.protocol.memory import MemoryListener, MemoryNetwork
from paramserver.protocol.messages import PartAddress, PartOrder
from paramserver.protocol.transport import Received
from paramserver.shard.block import HeldBlock
from paramserver.shard.core import ShardCore
from paramserver.shard.serving import Serving
from worker.client import Identity
from worker.counters import Counters
from worker.exchange import Codec, Exchange
from worker.local_optimizer import LocalOptimizer, State
from worker.replica import Replica

FULL_PRECISION = "fp32"
LATER_SECONDS = 1e6  # beyond every timer
BITS = 8  # of a byte


@dataclass(frozen=True)
class Traffic:
    """What the workers' steps took; the first snapshots are left out."""

    encoded_bytes: Mapping[str, int]  # payload by way
    full_bytes: Mapping[str, int]
    encoded_elements: Mapping[str, int]  # of the model
    elements: int
    pushed_bytes: int  # messages
    pulled_bytes: int
    staleness: float  # mean, in versions

    def bits(self, steps: int) -> dict[str, Any]:
        """An element and step, as fields of an Outcome."""
        found: dict[str, Any] = {"pushed_bytes": self.pushed_bytes, "pulled_bytes": self.pulled_bytes}
        for way, encoded in self.encoded_elements.items():
            full = self.elements - encoded
            full_bits = BITS * self.full_bytes[way] / (full * steps) if full else 0.0
            found[f"{way}_bits"] = BITS * self.encoded_bytes[way] / (encoded * steps) if encoded else full_bits
            found[f"full_{way}_bits"] = full_bits if encoded else 0.0
        found["full_share"] = 1 - max(self.encoded_elements.values()) / self.elements
        return found


class VirtualWorker:
    """A worker's replica, exchange and optimiser. It computes with a task that all share."""

    def __init__(self, replica: Replica, tensors: Mapping[str, Tensor], exchange: Exchange, counters: Counters) -> None:
        self.exchange = exchange
        self.counters = counters
        self.optimizer: LocalOptimizer | None = None
        self._replica = replica
        self._tensors = tensors

    def load(self, task: Task) -> None:
        """Write what this worker holds into the task's parameters."""
        with torch.no_grad():
            for parameter in task.parameters():
                parameter.tensor.copy_(self._tensors[parameter.name])

    def push(self, gradients: Mapping[str, Tensor]) -> None:
        """Push a step that was computed on what is held, and pull."""
        self.counters.steps += 1
        update = gradients if self.optimizer is None else self.optimizer.step(gradients)
        self.exchange.begin(update, self._replica.editions.copy(), self.counters.steps)
        self.exchange.settle()

    def forget(self) -> None:
        """Lose what rounding lost."""
        for block in self.exchange.residuals.blocks():
            self.exchange.residuals.clear(block)


class Cluster:
    """Serves one job. Used from one thread.

    Args:
        parameters: for names and shapes; each worker gets tensors of its own.
        weights: the first values.
        is_forgetful: publish without error feedback.
    """

    def __init__(
        self, job: Job, parameters: Sequence[Parameter], weights: Mapping[str, Tensor], is_forgetful: bool
    ) -> None:
        self._job = job
        self._parameters = parameters
        self._weights = weights
        self._network = MemoryNetwork(seed=job.seed)
        self._network.idle = self._pump
        self._workers: list[VirtualWorker] = []
        self.layout: Layout = Replica(parameters).layout
        placed = balance(self.layout, ["shard-0", "shard-1"], job.cluster.shards)
        self._shards: list[tuple[ShardCore, MemoryListener]] = []
        self._placement: list[PartAddress] = []
        for name, blocks in placed.items():
            core, listener = ShardCore(name), self._network.listen(f"{name}:0")
            core.take_order(
                PartOrder(name, job.name, job.json_text(), term=1, phase=0, layout=self.layout, blocks=blocks)
            )
            if is_forgetful:
                _serving(core).publishing = ForgetfulDeltas(dict(enumerate(_serving(core).pull_encodings)), job.pull)
            self._shards.append((core, listener))
            self._placement.append(PartAddress(name, listener.address, blocks))
        self._make_exchange("initial").exchange.initialise()

    def take_over(self, state: State, updates: int) -> None:
        """Go on from a plain process of so many updates: the blocks count them, for `adaptive` sends a young model's
        updates finely, and the shards get Adagrad's sums of squares, where the optimiser runs there.
        """
        for core, _ in self._shards:
            for block in _serving(core).blocks.values():
                block.version = updates
                _serving(core).publishing.forget(block.index)
                _serving(core).publishing.begin(block)  # its first edition is of this version
        if self._job.optimizer.where == "worker":
            return
        for block in self._blocks():
            place = self.layout.blocks[block.index]
            sums = state[place.parameter]["sum"].view(-1)
            block.state[0][:] = sums[place.start : place.start + place.elements].numpy()

    def connect(self, name: str) -> VirtualWorker:
        """A worker that has pulled the first values, which are not counted."""
        worker = self._make_exchange(name)
        self._workers.append(worker)
        worker.exchange.pull(0)
        worker.counters.push_bytes = worker.counters.pull_bytes = 0
        return worker

    def drain(self) -> None:
        """Flush all residuals, and publish what is left, as the end of a job does."""
        for worker in self._workers:
            worker.exchange.flush(worker.counters.steps, is_last=True)
        for core, _ in self._shards:
            core.publish_due(self._network.now)  # the timer sees what waits,
            core.publish_due(self._network.now + LATER_SECONDS)  # and it is due

    def norm(self) -> float:
        """The Euclidean norm of the weights."""
        return math.sqrt(sum(float(np.dot(block.weights, block.weights)) for block in self._blocks()))

    def traffic(self) -> Traffic:
        """Since the workers have connected."""
        telemetries = [_serving(core).telemetry for core, _ in self._shards]
        rows = [row for telemetry in telemetries for row in telemetry.traffic_rows()]
        ways = {"push": self._job.push.encodings(self.layout), "pull": self._job.pull.encodings(self.layout)}
        encoded, full, sizes = dict[str, int](), dict[str, int](), dict[str, int]()
        for way, encodings in ways.items():
            is_encoded = [encoding.identifier != FULL_PRECISION for encoding in encodings]
            sizes[way] = sum(
                block.elements for block, is_so in zip(self.layout.blocks, is_encoded, strict=True) if is_so
            )
            own = [row for row in rows if row.way == way]
            first = 4 * len(self._workers) if way == "pull" else 0  # bytes of first snapshots, an element
            encoded[way] = sum(row.payload_bytes for row in own if row.encoding != FULL_PRECISION) - first * sizes[way]
            full[way] = sum(row.payload_bytes for row in own if row.encoding == FULL_PRECISION)
            full[way] -= first * (self.layout.elements - sizes[way])
        staleness = [row for telemetry in telemetries for row in telemetry.staleness_rows()]
        updates = sum(sum(row.counts) for row in staleness)
        return Traffic(
            encoded,
            full,
            sizes,
            self.layout.elements,
            sum(worker.counters.push_bytes for worker in self._workers),
            sum(worker.counters.pull_bytes for worker in self._workers),
            sum(row.total for row in staleness) / max(1, updates),
        )

    def _make_exchange(self, name: str) -> VirtualWorker:
        tensors = {name: tensor.clone() for name, tensor in self._weights.items()}
        replica = Replica([Parameter(one.name, tensors[one.name], one.group) for one in self._parameters])
        push, counters = self._job.push, Counters()
        exchange = Exchange(
            self._network,
            self._placement,
            Identity(self._job.name, name, 1, self.layout.fingerprint),
            replica,
            Codec(
                push.encodings(self.layout), push.deadline_seconds, push.error, push.error_limit, push.settling_updates
            ),
            counters,
            clock=lambda: self._network.now,
        )
        return VirtualWorker(replica, tensors, exchange, counters)

    def _blocks(self) -> list[HeldBlock]:
        return [block for core, _ in self._shards for block in _serving(core).blocks.values()]

    def _pump(self) -> None:
        """Let the shards answer what has arrived."""
        for core, listener in self._shards:
            while (received := listener.receive(0)) is not None:
                assert isinstance(received, Received)  # nothing damages a message in memory
                for reply in core.handle(received.peer, received.message, received.frames):
                    listener.send(reply.peer, reply.message, [frame.data for frame in reply.frames])


def _serving(core: ShardCore) -> Serving:
    assert core.serving is not None  # it was given its order
    return core.serving
