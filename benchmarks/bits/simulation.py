"""One cell: the product's shards and workers around one model, in one process, in turns.

Each worker computes on the replica that it pulled at its last turn, pushes, and pulls. Everything between the gradients
and the weights is the product's (exchange, encoder, residuals, shard core, optimiser, publishing), over the network in
memory; the timer that publishes what waits never rings, for no time passes. Turns come in a random order of all
workers, the same in all cells of a seed, and so do the batches.

All cells of a seed start from the same weights and optimiser state, those of one process after some steps: the first
hundred steps are chaotic whatever is sent, and would hide a difference of a few percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.bits.cluster import Cluster, VirtualWorker
from benchmarks.bits.settings import Cell
from models.task import Batch, Task
from paramserver.cli.bench.crew import MeasurementError
from paramserver.job import Job, lease_examples_of
from worker.counters import Counters
from worker.local_optimizer import LocalOptimizer, State
from worker.stages import build_task
from worker.train import clip_, global_norm

ORDER_OF_WARM_UP = 1000  # added to the seed: the warm-up takes other batches


@dataclass(frozen=True)
class Start:
    """Where all cells of a task and seed begin."""

    task: Task  # its parameters are scratch: what a worker holds is written into them before it computes
    weights: Mapping[str, Tensor]
    optimizer: State


@dataclass(frozen=True)
class Outcome:
    """What a cell reached. Losses are bits a symbol; bits are those of an element and worker step."""

    train_loss: float  # mean over the second half: the same batches in every cell
    unflushed_loss: float  # validation, of the weights while the workers still hold their residuals
    weights_loss: float  # at the end: residuals flushed, all published
    replica_loss: float
    metrics: dict[str, float]  # validation means of the weights, as the task has them
    push_bits: float  # of encoded blocks; of all where none is encoded
    pull_bits: float
    full_push_bits: float  # of blocks at full precision that stand beside encoded ones; 0 where there are none
    full_pull_bits: float
    full_share: float  # of the elements that are in those blocks
    pushed_bytes: int  # messages with their heads, of all blocks, without the first snapshots
    pulled_bytes: int
    residual: float  # norm of what a worker held back in the end, the most of all, over that of the weights
    staleness: float  # mean, in versions
    curve: tuple[float, ...]  # training loss in bits, mean of each tenth


def leases(task: Task, size: int, seed: int) -> Iterator[list[int]]:
    """The leases of all epochs, without end: a seeded permutation of the examples, `size` of them each."""
    examples, epoch = task.examples("train"), 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(examples).tolist()
        yield from (order[start : start + size] for start in range(0, examples, size))
        epoch += 1


def batches_of(task: Task, source: Iterator[list[int]]) -> Iterator[Batch]:
    """The batches of one lease after another, as one worker takes them."""
    for lease in source:
        yield from task.batches("train", lease)


def make_start(job: Job, seed: int, warm_up: int) -> Start:
    """Train so many steps in one process. The job says model, data and optimiser."""
    task = build_task(job, Counters())
    tensors = {parameter.name: parameter.tensor for parameter in task.parameters()}
    optimizer = LocalOptimizer(job.optimizer, task.parameters())
    batches = batches_of(task, leases(task, lease_examples_of(job), seed + ORDER_OF_WARM_UP))
    for _ in range(warm_up):
        _, gradients = clipped_gradients(task, next(batches), job.optimizer.clip)
        with torch.no_grad():
            for name, update in optimizer.step(gradients).items():
                tensors[name].add_(update)
    return Start(task, {name: tensor.detach().clone() for name, tensor in tensors.items()}, optimizer.state_dict())


def clipped_gradients(task: Task, batch: Batch, clip: float | None) -> tuple[float, Mapping[str, Tensor]]:
    """Loss in nats, and the gradients as a worker pushes them. Raises MeasurementError where one is not finite."""
    step = task.gradients(batch)
    norm = global_norm(step.gradients)
    if not (math.isfinite(step.loss) and math.isfinite(norm)):
        raise MeasurementError(f"training has diverged: loss {step.loss}, gradient norm {norm}; lower the lr")
    clip_(step.gradients, norm, clip)
    return step.loss, step.gradients


def simulate(cell: Cell, start: Start) -> Outcome:
    """Train, drain and evaluate."""
    torch.set_num_threads(1)
    job = cell.job()
    cluster = Cluster(job, start.task.parameters(), start.weights, cell.setting.is_forgetful)
    cluster.take_over(start.optimizer, cell.warm_up)
    workers = [cluster.connect(f"worker-{number}") for number in range(cell.workers)]
    for worker in workers:
        worker.optimizer = _local_optimizer(job, start)
    losses = _train(cell, job, start, cluster, workers)
    traffic = cluster.traffic()
    residual = max(worker.exchange.residuals.norm() for worker in workers) / cluster.norm()
    workers[0].exchange.pull(cell.steps, "weights")
    unflushed_loss, _ = _evaluate(start.task, workers[0], lease_examples_of(job))
    cluster.drain()
    workers[0].exchange.pull(cell.steps, "weights")
    weights_loss, metrics = _evaluate(start.task, workers[0], lease_examples_of(job))
    workers[0].exchange.pull(cell.steps)
    replica_loss, _ = _evaluate(start.task, workers[0], lease_examples_of(job))
    tenth = max(1, len(losses) // 10)
    bits = np.array(losses) / math.log(2)
    return Outcome(
        train_loss=float(bits[len(bits) // 2 :].mean()),
        unflushed_loss=unflushed_loss,
        weights_loss=weights_loss,
        replica_loss=replica_loss,
        metrics=metrics,
        **traffic.bits(cell.steps),
        residual=residual,
        staleness=traffic.staleness,
        curve=tuple(round(float(bits[first : first + tenth].mean()), 4) for first in range(0, len(bits), tenth)),
    )


def _local_optimizer(job: Job, start: Start) -> LocalOptimizer | None:
    if job.optimizer.where == "server":
        return None
    optimizer = LocalOptimizer(job.optimizer, start.task.parameters())
    optimizer.load_state_dict(start.optimizer)
    return optimizer


def _train(cell: Cell, job: Job, start: Start, cluster: Cluster, workers: list[VirtualWorker]) -> list[float]:
    """The loss of each step, in nats."""
    source = leases(start.task, lease_examples_of(job), cell.seed)
    batches = [batches_of(start.task, source) for _ in workers]
    turns, order = np.random.default_rng(cell.seed), list[int]()
    losses: list[float] = []
    for _ in range(cell.steps):
        order = order or turns.permutation(len(workers)).tolist()
        number = order.pop()
        worker = workers[number]
        worker.load(start.task)
        loss, gradients = clipped_gradients(start.task, next(batches[number]), job.optimizer.clip)
        losses.append(loss)
        worker.push(gradients)
        if cell.setting.is_forgetful:
            worker.forget()
    return losses


def _evaluate(task: Task, worker: VirtualWorker, lease: int) -> tuple[float, dict[str, float]]:
    """Bits a symbol and mean metrics of the whole validation split at what the worker holds."""
    worker.load(task)
    loss_sum, elements, sums, examples = 0.0, 0, dict[str, float](), task.examples("valid")
    for first in range(0, examples, lease):
        for one in task.batches("valid", range(first, min(first + lease, examples))):
            evaluation = task.evaluate(one)
            loss_sum += evaluation.loss_sum
            elements += evaluation.elements
            for name, value in evaluation.metrics.items():
                sums[name] = sums.get(name, 0.0) + value
    return loss_sum / elements / math.log(2), {name: value / elements for name, value in sums.items()}
