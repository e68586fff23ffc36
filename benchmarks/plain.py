"""The plain reference: one process of ordinary torch on the same task, the same segments and the same order of leases.

Nothing of the parameter server is used here, so that its convergence is compared with something that
cannot share its mistakes. One thread; exact steps; prints one JSON object.

    python benchmarks/plain.py --optimizer adagrad --lr 0.05 --steps 1400 --seed 0
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from models.recurrent.arguments import RecurrentArguments, RecurrentData
from models.recurrent.corpus import load_corpus
from models.recurrent.floors import floors
from models.recurrent.task import RecurrentTask, Window


@dataclass(frozen=True)
class PlainResult:
    """What a plain run reached. Bits are a symbol, over the whole split."""

    steps: int
    elements: int  # training symbols seen
    valid_bits: float
    test_bits: float
    seconds: float  # of training alone
    steps_per_second: float


OPTIMIZERS = ("sgd", "adagrad", "adam")


def make_optimizer(name: str, parameters: list[torch.Tensor], lr: float) -> torch.optim.Optimizer:
    """The torch optimizer that means what a job's `optimizer: {name, lr}` means, defaults included."""
    match name:
        case "sgd":
            return torch.optim.SGD(parameters, lr=lr)
        case "adagrad":
            return torch.optim.Adagrad(parameters, lr=lr, eps=1e-8)
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    raise ValueError(f"optimizer {name!r} is not known here (allowed: {', '.join(OPTIMIZERS)})")


def lease_order(examples: int, batch: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's leases: a seeded permutation of all segments, `batch` of them a lease."""
    order = np.random.default_rng((seed, epoch)).permutation(examples).tolist()
    return [order[start : start + batch] for start in range(0, examples, batch)]


def training_batches(task: RecurrentTask, batch: int, seed: int) -> Iterator[Window]:
    """The batches of all epochs, without end."""
    epoch = 0
    while True:
        for lease in lease_order(task.examples("train"), batch, seed, epoch):
            yield from task.batches("train", lease)
        epoch += 1


def evaluate_bits(task: RecurrentTask, split: str, batch: int) -> float:
    """Cross-entropy of a whole split in bits a symbol."""
    loss_sum, elements, examples = 0.0, 0, task.examples(split)
    for start in range(0, examples, batch):
        for window in task.batches(split, range(start, min(start + batch, examples))):
            evaluation = task.evaluate(window)
            loss_sum += evaluation.loss_sum
            elements += evaluation.elements
    return loss_sum / elements / math.log(2)


def train_plain(
    arguments: RecurrentArguments,
    data: RecurrentData,
    *,
    optimizer: str,
    lr: float,
    steps: int,
    seed: int = 0,
    clip: float | None = 1.0,
) -> PlainResult:
    """Train for exactly `steps` steps and evaluate.

    Sets torch to one thread. Raises DataError for missing text, FloatingPointError for a loss that is
    not finite.
    """
    torch.set_num_threads(1)
    task = RecurrentTask(arguments, data, load_corpus(arguments, data), seed, torch.device("cpu"))
    named = {parameter.name: parameter.tensor for parameter in task.parameters()}
    stepper = make_optimizer(optimizer, list(named.values()), lr)
    elements, start = 0, time.perf_counter()
    for step, window in enumerate(training_batches(task, data.batch, seed), 1):
        result = task.gradients(window)
        if not math.isfinite(result.loss):
            raise FloatingPointError(f"step {step}: the loss is {result.loss}; lower the lr ({lr})")
        for name, gradient in result.gradients.items():
            named[name].grad = gradient
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(named.values(), clip)
        stepper.step()
        elements += result.elements
        if step == steps:
            break
    seconds = time.perf_counter() - start
    valid, test = (evaluate_bits(task, split, data.batch) for split in ("valid", "test"))
    return PlainResult(steps, elements, valid, test, seconds, steps / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="python-source", help="data set (default python-source)")
    parser.add_argument("--cell", default="lstm", choices=("rnn", "lstm", "gru"))
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--windows", type=int, default=RecurrentData.model_fields["windows"].default)
    parser.add_argument("--max-chars", type=int, default=None)
    parser.add_argument("--optimizer", default="adagrad", choices=OPTIMIZERS)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--clip", type=float, default=1.0, help="global gradient norm; 0 turns it off")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    arguments = RecurrentArguments(task="char-lm", cell=given.cell, hidden=given.hidden)
    data = RecurrentData(
        name=given.data, batch=given.batch, window=given.window, windows=given.windows, max_chars=given.max_chars
    )
    result = train_plain(
        arguments,
        data,
        optimizer=given.optimizer,
        lr=given.lr,
        steps=given.steps,
        seed=given.seed,
        clip=given.clip or None,
    )
    counted = floors(load_corpus(arguments, data), "valid")
    report = {"setting": vars(given), "result": asdict(result), "floors_valid_bits": asdict(counted)}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
