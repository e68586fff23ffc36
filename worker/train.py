"""The worker's hot path: compute on what is held, push what was learned, pull what others learned.

Read `Trainer.run` from top to bottom. Exchange hides the network, LeasedBatches the coordinator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from models.task import Batch, Step, Task
from paramserver.process import log
from paramserver.protocol.messages import Lease, LeaseDone
from worker.counters import Counters
from worker.exchange import Editions, Exchange
from worker.local_optimizer import LocalOptimizer
from worker.replica import Replica
from worker.task_calls import batches, from_task

RESIDUAL_EVERY_SECONDS = 1.0  # its norm is one pass over all residuals
TRAINING = "the training"  # as a failure names it


class LeaseSource(Protocol):
    """Where training leases come from and their results go."""

    def is_wanted(self) -> bool:
        """Whether training goes on: asked before each batch."""

    def is_leaving(self) -> bool:
        """Whether this process ends: a lease in the middle is handed back, not reported."""

    def next_lease(self) -> Lease | None:
        """A granted lease, now begun; None where none is here."""

    def wait_lease(self) -> None:
        """Sleep until a lease is here or training is over."""

    def finish(self, result: LeaseDone) -> None:
        """The updates of a begun lease are acknowledged."""


class Stop(Protocol):
    """Where the job is checkpointed: training stops for a moment, with nothing on its way."""

    def is_due(self, is_between_leases: bool) -> bool:
        """Asked before each batch."""

    def stop(self) -> None:
        """Every update has its verdict, and every ended lease its result: returns when training goes on."""


class LeasedBatches:
    """Batches of one lease after another. A lease is done when its last update is acknowledged, not before."""

    def __init__(
        self, task: Task, source: LeaseSource, exchange: Exchange, counters: Counters, stop: Stop | None = None
    ) -> None:
        self._task = task
        self._source = source
        self._exchange = exchange
        self._counters = counters
        self._stop = stop
        self._open: LeaseDone | None = None
        self._unacknowledged: list[tuple[LeaseDone, float]] = []  # result, examples

    def __iter__(self) -> Iterator[Batch]:
        while (lease := self._next()) is not None:
            self._open = LeaseDone(number=lease.number)
            is_whole = True
            for batch in batches(self._task, lease, TRAINING):
                if not self._source.is_wanted():
                    is_whole = False
                    break
                self._stop_if_due(is_between_leases=False)
                yield batch
            if is_whole or not self._source.is_leaving():
                self._unacknowledged.append((self._open, float(len(lease.examples)) if is_whole else 0.0))
        self._exchange.settle_pushes()
        self.acknowledged()

    def _next(self) -> Lease | None:
        has_waited = False
        while self._source.is_wanted():
            self._stop_if_due(is_between_leases=True)
            if (lease := self._source.next_lease()) is not None:
                if has_waited:
                    # Others went on meanwhile: what is held may be very stale.
                    self._exchange.settle()
                    self._exchange.pull(self._counters.steps)
                return lease
            # Nothing to overlap with: report what is done, or others would wait for it.
            self._exchange.settle_pushes()
            self.acknowledged()
            started = time.monotonic()
            self._source.wait_lease()
            has_waited = True
            self._counters.waiting_seconds += time.monotonic() - started
        return None

    def _stop_if_due(self, is_between_leases: bool) -> None:
        if self._stop is not None and self._stop.is_due(is_between_leases):
            self._exchange.settle()
            self.acknowledged()
            self._stop.stop()

    def done(self, step: Step, is_good: bool) -> None:
        """Add one batch to the open lease."""
        assert self._open is not None  # a batch comes from a lease
        was = self._open
        if is_good:
            metrics = {name: was.metrics.get(name, 0.0) + value for name, value in step.metrics.items()}
            self._open = LeaseDone(
                number=was.number,
                steps=was.steps + 1,
                elements=was.elements + step.elements,
                loss_sum=was.loss_sum + step.loss * step.elements,
                skipped_steps=was.skipped_steps,
                metrics={**was.metrics, **metrics},
            )
        else:
            self._open = LeaseDone(
                number=was.number,
                steps=was.steps,
                elements=was.elements,
                loss_sum=was.loss_sum,
                skipped_steps=was.skipped_steps + 1,
                metrics=was.metrics,
            )

    def acknowledged(self) -> None:
        """Every update so far has its verdict: the leases that ended are done."""
        for result, examples in self._unacknowledged:
            self._counters.finished_examples += examples
            self._source.finish(result)
        self._unacknowledged.clear()


class Trainer:
    """Trains until the source says that it is over. Used from one thread.

    Args:
        clip: largest global norm of a step's gradients, None for no limit.
        patience: how long a step waits for its exchange before the next batch is computed, as a share of its
            own computing time. 0 always leaves one exchange in flight, infinity never does.
        optimizer: where the job has it run on the worker: what is pushed is then the update that the shards add.
        stop: for checkpoints.
    """

    def __init__(
        self,
        task: Task,
        replica: Replica,
        exchange: Exchange,
        source: LeaseSource,
        counters: Counters,
        clip: float | None,
        patience: float,
        optimizer: LocalOptimizer | None = None,
        clock: Callable[[], float] = time.monotonic,
        stop: Stop | None = None,
    ) -> None:
        self.task = task
        self.replica = replica
        self.exchange = exchange
        self.batches = LeasedBatches(task, source, exchange, counters, stop)
        self.counters = counters
        self.clip = clip
        self.patience = patience
        self.optimizer = optimizer
        self._clock = clock
        self._residual_at = 0.0

    def run(self) -> None:
        """Returns when training is over here: every update has its verdict, every lease its result."""
        began, waited = self._clock(), self.counters.waiting_seconds
        for batch in self.batches:
            editions = self.replica.editions.copy()  # (blocks,): what the gradients are computed on
            started = self._clock()
            with from_task(TRAINING):
                step = self.task.gradients(batch)
            computing_seconds = self._clock() - started
            self.exchange.settle()  # where it was left in flight: the last step's values are written
            self.batches.acknowledged()
            is_good = self.push(step, editions, computing_seconds)
            self.exchange.settle(math.inf if self.patience == math.inf else self.patience * computing_seconds)
            self.batches.done(step, is_good)
            now = self._clock()
            self.counters.working_seconds += now - began - (self.counters.waiting_seconds - waited)
            began, waited = now, self.counters.waiting_seconds
            self._look_at_residual(now)
        self.exchange.abandon_pulls()

    def push(self, step: Step, editions: Editions, computing_seconds: float) -> bool:
        """Push a step's gradients; False for a step that is not finite: it is skipped, and the clock ticks."""
        self.counters.steps += 1
        clock = self.counters.steps
        norm = global_norm(step.gradients)
        if not (math.isfinite(step.loss) and math.isfinite(norm)):
            self.counters.skipped_steps += 1
            log("step-skipped", level="warning", step=clock, loss=step.loss, gradient_norm=norm, reason="not finite")
            self.exchange.tick(clock)
            self.exchange.ask(clock)
            return False
        self.counters.saw(step.loss, step.elements, step.metrics)
        clip_(step.gradients, norm, self.clip)
        update = step.gradients if self.optimizer is None else self.optimizer.step(step.gradients)
        self.exchange.begin(update, editions, clock, computing_seconds)
        return True

    def _look_at_residual(self, now: float) -> None:
        if now >= self._residual_at:
            self.counters.residual_norm = self.exchange.residuals.norm()
            self._residual_at = now + RESIDUAL_EVERY_SECONDS


def global_norm(gradients: Mapping[str, Tensor]) -> float:
    """The Euclidean norm over all gradients jointly; not finite where one element is not."""
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients.values()]
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    if math.isfinite(norm):
        return norm
    # Squares of large finite float32 values overflow; double precision tells them from infinities.
    return math.sqrt(sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in gradients.values()))


def clip_(gradients: Mapping[str, Tensor], norm: float, largest: float | None) -> None:
    """Scale gradients of this global norm in place, so that it is at most `largest` (Pascanu et al. 2013)."""
    if largest is not None and norm > largest:
        for gradient in gradients.values():
            gradient.mul_(largest / norm)
