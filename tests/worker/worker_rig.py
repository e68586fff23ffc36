"""A worker's parts against real shard cores over the network in memory: no thread, no sleep, no socket."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from models.task import Evaluation, Parameter, Step
from paramserver.job import PushSettings
from paramserver.protocol.memory import MemoryNetwork
from paramserver.protocol.messages import Lease, LeaseDone, Member, Message, PartAddress, PartOrder, Push
from paramserver.protocol.transport import Received
from paramserver.shard.core import Reply, ShardCore
from worker.client import Identity
from worker.counters import Counters
from worker.exchange import Codec, Exchange
from worker.replica import CodecPath, Replica

SHAPES = {"first.weight": (8, 16), "first.bias": (40,), "second.weight": (3, 70)}
DEADLINE_SECONDS = 1.0


def make_parameters(value: float = 0.0) -> list[Parameter]:
    return [Parameter(name, torch.full(shape, value), name.split(".")[0]) for name, shape in SHAPES.items()]


def make_gradients(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Shard:
    """A shard core behind a listener. `intercept` may look at a message and answer it in the core's stead."""

    def __init__(self, network: MemoryNetwork, name: str) -> None:
        self.core = ShardCore(name)
        self.listener = network.listen(f"{name}:0")
        self.heard: list[tuple[Message, tuple[bytes, ...]]] = []
        self.intercept: Callable[[Received], list[Reply] | None] = lambda received: None

    def pump(self) -> None:
        while (received := self.listener.receive(0)) is not None:
            assert isinstance(received, Received)
            self.heard.append((received.message, tuple(bytes(frame) for frame in received.frames)))
            replies = self.intercept(received)
            if replies is None:
                replies = self.core.handle(received.peer, received.message, received.frames)
            self.send(replies)

    def send(self, replies: Sequence[Reply]) -> None:
        for reply in replies:
            self.listener.send(reply.peer, reply.message, reply.frames)

    def pushes(self) -> list[tuple[Push, tuple[bytes, ...]]]:
        return [(message, frames) for message, frames in self.heard if isinstance(message, Push)]

    def weights(self, block: int) -> np.ndarray:
        assert self.core.serving is not None
        return self.core.serving.blocks[block].weights


class Rig:
    """Two shards and one worker's exchange. Server-side SGD at lr 1: weights = first values - sum of updates."""

    def __init__(
        self,
        encoding: str = "fp32",
        network: MemoryNetwork | None = None,
        members: tuple[str, ...] = (),
        initialise: bool = True,
        path: CodecPath = "auto",
        push: Mapping[str, object] | None = None,
        **settings: object,
    ) -> None:
        self.network = network or MemoryNetwork(seed=1)
        self.shards = [Shard(self.network, "shard-0"), Shard(self.network, "shard-1")]
        self.replica = Replica(make_parameters(), path)
        self.layout = self.replica.layout
        self.specification = json.dumps(
            {
                "name": "job",
                "model": {"family": "recurrent"},
                "optimizer": {"name": "sgd", "lr": 1.0},
                "push": {"encoding": encoding, **(push or {})},
                "pull": {"encoding": "fp32"},
                **settings,
            }
        )
        self.blocks = ((0, 2), (1,))
        self.order(members=members)
        self.placement = [
            PartAddress(shard.core.name, shard.listener.address, blocks)
            for shard, blocks in zip(self.shards, self.blocks, strict=True)
        ]
        self.counters = Counters()
        self.guard: Callable[[], None] = lambda: None
        self.network.idle = self.pump
        self.push = PushSettings.model_validate({"encoding": encoding, **(push or {})})
        self.settling_updates = int(str((push or {}).get("settling_updates", 0)))  # none where a test names none
        self.exchange = self.connect()
        if initialise:
            self.exchange.initialise()

    def order(self, term: int = 1, members: tuple[str, ...] = ()) -> None:
        for shard, blocks in zip(self.shards, self.blocks, strict=True):
            order = PartOrder(
                part=shard.core.name,
                job="job",
                specification=self.specification,
                term=term,
                phase=0,
                layout=self.layout,
                blocks=blocks,
                members=tuple(Member(name, 1) for name in members),
            )
            shard.send(shard.core.take_order(order))

    def connect(self, worker: str = "w0", replica: Replica | None = None, is_resumed: bool = False) -> Exchange:
        return Exchange(
            self.network,
            self.placement,
            Identity("job", worker, 1, self.layout.fingerprint),
            replica or self.replica,
            Codec(self.push.encodings(self.layout), DEADLINE_SECONDS, settling_updates=self.settling_updates),
            self.counters,
            lambda: self.guard(),
            lambda: self.network.now,
            is_resumed,
        )

    def pump(self) -> None:
        for shard in self.shards:
            shard.pump()

    def weights(self, block: int) -> np.ndarray:
        return next(s for s, held in zip(self.shards, self.blocks, strict=True) if block in held).weights(block)

    def step(self, seed: int, step: int) -> dict[str, Tensor]:
        """One step strictly in turn."""
        gradients = make_gradients(seed)
        self.exchange.begin(gradients, self.replica.editions.copy(), step)
        self.exchange.settle()
        return gradients

    def updates(self) -> int:
        return sum(shard.core.serving.telemetry.updates for shard in self.shards if shard.core.serving)


def total(gradients: Sequence[dict[str, Tensor]], name: str) -> np.ndarray:
    return np.sum([gradient[name].numpy().ravel() for gradient in gradients], axis=0)


class CountingTask:
    """A task of SHAPES whose batch is (lease example, position); it records the weights that each saw."""

    def __init__(self, batches_a_lease: int = 2) -> None:
        self.batches_a_lease = batches_a_lease
        self.own = make_parameters()
        self.seen: list[float] = []
        self.gradient = 1.0
        self.loss = 2.0
        self.on_gradients: Callable[[], None] = lambda: None

    def parameters(self) -> list[Parameter]:
        return self.own

    def examples(self, split: str) -> int:
        return {"train": 8, "valid": 2, "test": 2}[split]

    def batches(self, split: str, examples: Sequence[int]) -> Iterator[tuple[int, int]]:
        for position in range(self.batches_a_lease):
            yield (examples[0], position)

    def groups(self, batch: object) -> tuple[str, ...]:
        return ()

    def gradients(self, batch: object) -> Step:
        self.seen.append(float(self.own[0].tensor[0, 0]))
        gradients = {name: torch.full(shape, self.gradient) for name, shape in SHAPES.items()}
        step = Step(loss=self.loss, elements=10, gradients=gradients, metrics={"right": 3.0})
        self.on_gradients()
        return step

    def evaluate(self, batch: object) -> Evaluation:
        return Evaluation(loss_sum=5.0, elements=10)

    def export(self) -> dict[str, Tensor]:
        return {parameter.name: parameter.tensor for parameter in self.own}


class ListedLeases:
    """A LeaseSource over a list: training is over when it is empty."""

    def __init__(self, leases: Sequence[Lease]) -> None:
        self.leases = list(leases)
        self.results: list[LeaseDone] = []
        self.wanted = True
        self.leaving = False

    def is_wanted(self) -> bool:
        return self.wanted and not self.leaving

    def is_leaving(self) -> bool:
        return self.leaving

    def next_lease(self) -> Lease | None:
        return self.leases.pop(0) if self.leases else None

    def wait_lease(self) -> None:
        self.wanted = False

    def finish(self, result: LeaseDone) -> None:
        self.results.append(result)
