"""The stages of a job other than training, each a plain function: initialise, evaluate, drain, export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from safetensors.torch import save

from models.task import Parameter, Task
from paramserver.families import families, known_families, load_function
from paramserver.job import Job
from paramserver.process import log
from paramserver.protocol.messages import Lease, LeaseDone
from worker.counters import Counters
from worker.device import choose_device
from worker.errors import JobFailure
from worker.exchange import Exchange
from worker.task_calls import batches, from_task

SPLITS = ("train", "valid", "test")
EVALUATION = "the evaluation"  # as a failure names it


def build_task(job: Job, counters: Counters) -> Task:
    """The job's task on this worker's device. Raises JobFailure with the text of what is the user's to mend."""
    device = choose_device(job.device)
    counters.device = str(device)
    family = families().get(job.model.family)
    if family is None:
        raise JobFailure(
            f"this worker has no model family {job.model.family!r} (known: {known_families()}); "
            "install it here, or allow it"
        )
    try:
        # DataError is a ValueError; so is what a family's own schema refuses.
        arguments = family.arguments.model_validate(job.model.args)
        data = family.data.model_validate(job.data)
        return cast(Task, load_function(family.task)(arguments, data, job.seed, device))
    except ValueError as error:
        raise JobFailure(f"the task cannot be built: {error}") from error


def count_examples(task: Task) -> dict[str, int]:
    """How many examples each split has."""
    return {split: task.examples(split) for split in SPLITS}


def evaluate(task: Task, lease: Lease, go_on: Callable[[], None]) -> LeaseDone:
    """Sums of one evaluation lease at the present parameters. `go_on` raises where it is not wanted any more.

    Raises JobFailure where the task refuses its data.
    """
    steps, elements, loss_sum = 0, 0, 0.0
    metrics: dict[str, float] = {}
    for batch in batches(task, lease, EVALUATION):
        go_on()
        with from_task(EVALUATION):
            evaluation = task.evaluate(batch)
        steps += 1
        elements += evaluation.elements
        loss_sum += evaluation.loss_sum
        for name, value in evaluation.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
    return LeaseDone(number=lease.number, steps=steps, elements=elements, loss_sum=loss_sum, metrics=metrics)


def drain(exchange: Exchange, counters: Counters, is_last: bool) -> None:
    """Flush what the encodings still hold back, at the end of the job or of this worker alone.

    Returns when it is acknowledged.
    """
    exchange.settle_pushes()
    exchange.abandon_pulls()
    log("residuals-flushed", norm=exchange.residuals.norm(), is_last=is_last)
    exchange.flush(counters.steps, is_last)
    counters.residual_norm = exchange.residuals.norm()


def export_bytes(task: Task) -> bytes:
    """model.safetensors of the task at the present parameters."""
    tensors: Mapping[str, Any] = task.export()
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def from_module(named: Mapping[str, Any]) -> list[Parameter]:
    """Parameters of a plain mapping or of a torch module's `named_parameters`; a group is a module's path."""
    return [Parameter(name, tensor, name.rpartition(".")[0] or name) for name, tensor in named.items()]
