"""The library form: any torch training script becomes a worker of shards that serve its job.

    with attach(model, shards, job="char-lm", worker="mine") as attached:
        for batch in batches:
            loss(model, batch).backward()
            attached.push({name: p.grad for name, p in model.named_parameters()})
            model.zero_grad()

The worker process is built on the same Replica and Exchange.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from models.task import Parameter
from paramserver.job import PushSettings
from paramserver.protocol.messages import PartAddress
from paramserver.protocol.transport import Transport
from worker.client import Identity
from worker.counters import Counters
from worker.exchange import Codec, Exchange
from worker.replica import Replica
from worker.stages import from_module


class Attached:
    """A model whose parameters live on shards. Used from one thread. Made by `attach`."""

    def __init__(
        self,
        replica: Replica,
        exchange: Exchange,
        counters: Counters,
        owned: Transport | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replica = replica
        self.counters = counters
        self._exchange = exchange
        self._owned = owned
        self._clock = clock
        self._editions = replica.editions.copy()
        self._returned_at = clock()  # from the last call: what comes before the next push is computation

    def initialise(self) -> None:
        """Give the shards the model's present values as the first ones; the same values may be given again."""
        self._exchange.initialise()
        self._returned_at = self._clock()

    def pull(self) -> None:
        """Write the shards' present values into the model, and wait for it."""
        self._exchange.pull(self.counters.steps)
        self._hand_over()

    def evaluate(self) -> None:
        """Write the shards' own weights into the model, at full precision, to evaluate or to keep it.

        `pull` brings the replica back before training goes on.
        """
        self._exchange.pull(self.counters.steps, "weights")

    def push(self, gradients: Mapping[str, Tensor]) -> None:
        """Push gradients by parameter name, computed on what the last call left in the model.

        Waits until they are acknowledged and fresh values are written into the model. A refused update is
        held back and goes out with the next one. The time since the last call counts as the step's computation:
        where exchanges take longer, `adaptive` sends less, and shards publish less often. Raises JobFailure where
        the shards refuse for good.
        """
        computing_seconds = self._clock() - self._returned_at
        self.counters.steps += 1
        self._exchange.begin(gradients, self._editions, self.counters.steps, computing_seconds)
        self._exchange.settle()
        self._hand_over()

    def close(self, is_last: bool = False) -> None:
        """Flush what encodings hold back, then disconnect.

        `is_last`: nobody trains any more. The shards then take residuals at a small learning rate, for no later step
        corrects what they do.
        """
        try:
            self._exchange.flush(self.counters.steps, is_last)
        finally:
            self._disconnect()

    def _hand_over(self) -> None:
        """The model is the caller's again, to compute on."""
        self._editions = self.replica.editions.copy()
        self._returned_at = self._clock()

    def _disconnect(self) -> None:
        self._exchange.close()
        if self._owned is not None:
            self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._disconnect()  # a flush might wait for the very shards that failed


def attach(
    model: torch.nn.Module | Mapping[str, Tensor] | Sequence[Parameter],
    shards: Sequence[PartAddress],
    *,
    job: str,
    worker: str,
    incarnation: int | None = None,
    push: PushSettings | None = None,
    keys: Path | None = None,
    transport: Transport | None = None,
) -> Attached:
    """Connect a model to the shards that hold its blocks.

    Args:
        model: its float32 parameters, in layout order. The layout must be the one that the shards serve.
        shards: the parts of the model and where each is served; together every block once. One shard may serve several.
        incarnation: must grow with every process of this worker name; the wall clock where it is not given.
        push: how updates are encoded, as the job has it, for example PushSettings(encoding="int4"); its defaults
            where it is not given.
        keys: where the shards use keys, the folder with the secret key of `worker` (see `paramserver keygen`). They
            let in only workers of whose key and incarnation their coordinator has told them.
        transport: where it is not given, ZeroMQ, closed with the result.

    Raises ValueError for parameters that are not float32 and for keys beside a transport, which has its own;
    TransportError for an address that is none and for keys that cannot be used.
    """
    if keys is not None and transport is not None:
        raise ValueError("give either keys or a transport: the transport was made with its keys, or without")
    if isinstance(model, torch.nn.Module):
        parameters: Sequence[Parameter] = from_module(dict(model.named_parameters()))
    elif isinstance(model, Mapping):
        parameters = from_module(model)
    else:
        parameters = model
    push = push or PushSettings()
    replica = Replica(parameters)
    owned: Transport | None = None
    if transport is None:
        # A script that brings its own transport needs no zmq.
        from paramserver.protocol.keys import load_keys
        from paramserver.protocol.zeromq import ZeroMQTransport

        transport = owned = ZeroMQTransport(None if keys is None else load_keys(keys, worker))
    counters = Counters()
    exchange = Exchange(
        transport,
        shards,
        Identity(
            job, worker, time.time_ns() // 1000 if incarnation is None else incarnation, replica.layout.fingerprint
        ),
        replica,
        Codec(
            push.encodings(replica.layout), push.deadline_seconds, push.error, push.error_limit, push.settling_updates
        ),
        counters,
    )
    return Attached(replica, exchange, counters, owned)
