"""Loss against bytes: encodings of push and pull compared at equal examples, with virtual asynchronous workers.

One process trains the char-LSTM of plain.py for N workers that take turns: each computes on the replica that it
pulled at its last turn, pushes, and pulls. The shard applies Adagrad and publishes a block every ceil(N / 2) pushes
by an encoded delta against the published replica. All encoders, decoders and policies are those of the product; the
rest is plain numpy, and nothing depends on a clock. Vectors (biases) go at full precision and are not counted.
All cells of a seed start from the same weights, those of a plain process after some steps: the first hundred steps
are chaotic whatever is sent, and would hide a difference of a few percent.

    python -m benchmarks bits --workers 8 fp32,fp32 int4,ternary adaptive:0.6,coded:2 sign,ternary,worker
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.plain import evaluate_bits, training_batches
from benchmarks.report import show
from models.recurrent.arguments import RecurrentArguments, RecurrentData
from models.recurrent.corpus import load_corpus
from models.recurrent.task import RecurrentTask
from paramserver.encoding import Encoding, make_encoding
from paramserver.encoding.adaptive import DEFAULT_ERROR_LIMIT, BitPolicy, Part
from paramserver.encoding.coded import RELATIVE_STEP, Coded, StepPolicy
from paramserver.job import PushSettings
from paramserver.protocol.layout import Parameter, cut_layout

Float32 = npt.NDArray[np.float32]
Blocks = dict[int, Float32]

BATCH, WINDOW = 16, 64
EPSILON = np.float32(1e-8)


@dataclass(frozen=True)
class Setting:
    """One cell: NAME or NAME:NUMBER each way. The number is adaptive's error, or coded's step over the rms."""

    push: str
    pull: str
    workers: int
    steps: int  # of all workers together
    warm_up: int  # of a plain process before
    seed: int
    hidden: int = 128
    lr: float = 0.05
    where: str = "server"  # or "worker": Adagrad before the encoding, and the shard adds


@dataclass
class Outcome:
    """What a cell reached. Bits are those of an encoded element: a push, and what a worker downloads for its step."""

    train_bits: float  # a character, mean over the second half: the same batches in every cell
    valid_bits: float  # of the weights in the end
    push_bits: float
    pull_bits: float
    residual: float  # norm of what the workers hold back, over that of the weights
    distance: float  # of the published replica from the weights, over the norm of the weights
    curve: list[float] = field(default_factory=list)  # training loss in nats, mean of each tenth


class Pusher(Protocol):
    """A worker's encoder with its state."""

    def push(self, updates: Blocks) -> tuple[Blocks, int]:
        """What arrives at the shard of these updates, and the bytes of the frames."""

    def norm(self) -> float: ...


class UniformPusher:
    """One encoding for all blocks."""

    def __init__(self, encoding: Encoding, elements: Mapping[int, int]) -> None:
        self._encoding = encoding
        self._residuals = {block: np.zeros(size, np.float32) for block, size in elements.items()}

    def push(self, updates: Blocks) -> tuple[Blocks, int]:
        arrived, taken = {}, 0
        for block, values in updates.items():
            frame = np.empty(self._encoding.frame_bytes(values.size), np.uint8)
            size = self._encoding.encode(values, frame, self._residuals[block])
            arrived[block] = decoded(self._encoding, frame[:size], values.size)
            taken += size
        return arrived, taken

    def norm(self) -> float:
        return norm(self._residuals.values())


class AdaptivePusher:
    """Bits by segment, planned over all blocks; finely over the first updates of a model, as a job does by default.

    `seen` updates has the model when training begins, and `workers` more for each push of this one.
    """

    def __init__(self, error: float, elements: Mapping[int, int], workers: int, seen: int) -> None:
        settling = int(PushSettings.model_fields["settling_updates"].default)
        self._policy = BitPolicy(elements, 64, error, max(error, DEFAULT_ERROR_LIMIT), settling_updates=settling)
        self._workers, self._seen = workers, seen
        self._residuals = {block: np.zeros(size, np.float32) for block, size in elements.items()}

    def push(self, updates: Blocks) -> tuple[Blocks, int]:
        parts = {block: Part(values, self._residuals[block]) for block, values in updates.items()}
        plan = self._policy.plan(parts, updates=self._seen)
        self._seen += self._workers
        arrived, taken = {}, 0
        for block, part in parts.items():
            if block not in plan.levels:
                plan.hold(part)
                continue
            frame = np.empty(plan.frame_bytes(block, part.values.size), np.uint8)
            taken += plan.encode(block, part, frame)
            arrived[block] = decoded(plan.encoding, frame, part.values.size)
        return arrived, taken

    def norm(self) -> float:
        return norm(self._residuals.values())


class CodedPusher:
    """One step for all of a worker's blocks, entropy-coded: its residual is what `published` is to a shard."""

    def __init__(self, relative: float, elements: Mapping[int, int]) -> None:
        self._policy = StepPolicy(relative)
        self._coded = make_encoding("coded")
        # What was to be sent in all, and what was sent in all; their difference is the residual.
        self._due = {block: np.zeros(size, np.float32) for block, size in elements.items()}

    def push(self, updates: Blocks) -> tuple[Blocks, int]:
        arrived, taken = {}, 0
        for block, values in updates.items():
            due, sent = self._due[block] + values, np.zeros_like(values)
            frame = np.empty(self._coded.frame_bytes(values.size), np.uint8)
            taken += self._policy.publish(block, due, sent, frame)
            self._due[block] = due - sent
            arrived[block] = sent
        return arrived, taken

    def norm(self) -> float:
        return norm(self._due.values())


class Publisher:
    """A shard's published replica, and the bytes of the delta of each block's last edition."""

    def __init__(self, name: str, weights: Blocks) -> None:
        kind, number = split(name)
        self.published = {block: values.copy() for block, values in weights.items()}
        self._encoding = make_encoding(kind)
        self._policy = StepPolicy(number or RELATIVE_STEP)

    def publish(self, block: int, weights: Float32) -> int:
        published = self.published[block]
        frame = np.empty(self._encoding.frame_bytes(weights.size), np.uint8)
        if isinstance(self._encoding, Coded):
            return self._policy.publish(block, weights, published, frame)
        size = self._encoding.encode(weights - published, frame)
        self._encoding.decode_add(frame[:size], published)
        return size


def decoded(encoding: Encoding, frame: npt.NDArray[np.uint8], elements: int) -> Float32:
    encoding.check(frame, elements)
    out = np.empty(elements, np.float32)
    encoding.decode(frame, out)
    return out


def norm(arrays: Iterable[Float32]) -> float:
    return math.sqrt(math.fsum(float(np.square(array, dtype=np.float64).sum()) for array in arrays))


def split(name: str) -> tuple[str, float | None]:
    kind, _, number = name.partition(":")
    return kind, float(number) if number else None


def make_pusher(name: str, elements: Mapping[int, int], workers: int, seen: int) -> Pusher:
    kind, number = split(name)
    if kind == "adaptive":
        return AdaptivePusher(number or 0.6, elements, workers, seen)
    if kind == "coded":
        return CodedPusher(number or RELATIVE_STEP, elements)
    return UniformPusher(make_encoding(kind), elements)


class Adagrad:
    """Updates from gradients, block by block."""

    def __init__(self, lr: float, elements: Mapping[int, int]) -> None:
        self._lr = np.float32(lr)
        self._squares = {block: np.zeros(size, np.float32) for block, size in elements.items()}

    def update(self, block: int, gradient: Float32) -> Float32:
        squares = self._squares[block]
        squares += gradient * gradient
        step: Float32 = np.asarray(-self._lr * (gradient / (np.sqrt(squares) + EPSILON)), np.float32)
        return step

    def copy(self) -> Adagrad:
        other = Adagrad(float(self._lr), {})
        other._squares = {block: squares.copy() for block, squares in self._squares.items()}
        return other


class Simulation:
    """One cell, from the first weights to the evaluation."""

    def __init__(self, setting: Setting) -> None:
        torch.set_num_threads(1)
        self._setting = setting
        arguments = RecurrentArguments(task="char-lm", cell="lstm", hidden=setting.hidden)
        characters = int(1.2 * setting.steps * BATCH * WINDOW) + 400_000
        data = RecurrentData(name="python-source", batch=BATCH, window=WINDOW, windows=16, max_chars=characters)
        self._task = RecurrentTask(arguments, data, load_corpus(arguments, data), setting.seed, torch.device("cpu"))
        self._tensors = {one.name: one.tensor for one in self._task.parameters()}
        layout = cut_layout(Parameter(name, tuple(tensor.shape), "") for name, tensor in self._tensors.items())
        self._blocks = layout.blocks
        elements = {block.index: block.elements for block in layout.blocks}
        is_vector = {name: tensor.dim() < 2 for name, tensor in self._tensors.items()}
        self._vectors = {block.index for block in layout.blocks if is_vector[block.parameter]}
        encoded = {block: size for block, size in elements.items() if block not in self._vectors}
        self._encoded_elements = sum(encoded.values())
        warm = Adagrad(setting.lr, elements)
        for _, window in zip(range(setting.warm_up), training_batches(self._task, BATCH, 1000), strict=False):
            for block, gradient in self._clipped(self._task.gradients(window).gradients).items():
                self._view(block)[:] += warm.update(block, gradient)
        self._weights: Blocks = {block: self._view(block).copy() for block in elements}
        self._publisher = Publisher(setting.pull, {block: self._weights[block] for block in encoded})
        self._pushers = [
            make_pusher(setting.push, encoded, setting.workers, setting.warm_up) for _ in range(setting.workers)
        ]
        if setting.where == "worker":
            self._optimizers = [warm.copy() for _ in range(setting.workers)]
        else:
            self._optimizers = [warm] * setting.workers

    def _view(self, block: int) -> Float32:
        place = self._blocks[block]
        flat: Float32 = self._tensors[place.parameter].detach().view(-1).numpy()
        return flat[place.start : place.start + place.elements]

    def _load(self, values: Blocks) -> None:
        for block, content in values.items():
            np.copyto(self._view(block), content)

    def _replica(self) -> Blocks:
        """What a worker holds after a pull."""
        return {
            block: (weights if block in self._vectors else self._publisher.published[block]).copy()
            for block, weights in self._weights.items()
        }

    def run(self) -> Outcome:
        """Train, and evaluate the weights."""
        setting = self._setting
        batches = [training_batches(self._task, BATCH, seed) for seed in range(setting.workers)]
        replicas = [self._replica() for _ in range(setting.workers)]
        since = dict.fromkeys(self._weights, 0)
        published_bytes = 0  # of all deltas so far
        have = [0] * setting.workers
        push_bytes = pull_bytes = 0
        losses: list[float] = []
        # In a random order of turns, so that staleness varies as it does in life.
        turns = np.random.default_rng(setting.seed)
        order: list[int] = []
        for _ in range(setting.steps):
            order = order or turns.permutation(setting.workers).tolist()
            worker = order.pop()
            self._load(replicas[worker])
            step = self._task.gradients(next(batches[worker]))
            losses.append(step.loss)
            taken, touched = self._push(worker, self._clipped(step.gradients))
            push_bytes += taken
            for block in touched:
                since[block] += 1
                if block not in self._vectors and since[block] >= math.ceil(setting.workers / 2):
                    published_bytes += self._publisher.publish(block, self._weights[block])
                    since[block] = 0
            pull_bytes += published_bytes - have[worker]
            have[worker] = published_bytes
            replicas[worker] = self._replica()
        self._load(self._weights)
        elements = self._encoded_elements * setting.steps
        published = self._publisher.published
        weights = norm(self._weights[block] for block in published)
        tenth = max(1, len(losses) // 10)
        return Outcome(
            train_bits=float(np.mean(losses[len(losses) // 2 :])) / math.log(2),
            valid_bits=evaluate_bits(self._task, "valid", BATCH),
            push_bits=8 * push_bytes / elements,
            pull_bits=8 * pull_bytes / elements,
            residual=max(pusher.norm() for pusher in self._pushers) / weights,
            distance=norm(self._weights[block] - published[block] for block in published) / weights,
            curve=[float(np.mean(losses[start : start + tenth])) for start in range(0, len(losses), tenth)],
        )

    def _clipped(self, gradients: Mapping[str, torch.Tensor]) -> Blocks:
        """Gradients by block, at most 1 long together."""
        clip = min(1.0, 1.0 / (math.sqrt(sum(float(one.square().sum()) for one in gradients.values())) + 1e-6))
        flat = {name: one.view(-1).numpy() for name, one in gradients.items()}
        return {
            block.index: flat[block.parameter][block.start : block.start + block.elements] * np.float32(clip)
            for block in self._blocks
        }

    def _push(self, worker: int, gradients: Blocks) -> tuple[int, set[int]]:
        """One step's updates to the shard: (bytes of the encoded ones, blocks that got one)."""
        optimizer, is_local = self._optimizers[worker], self._setting.where == "worker"
        updates = gradients
        if is_local:
            updates = {block: optimizer.update(block, gradient) for block, gradient in gradients.items()}
        arrived, taken = self._pushers[worker].push(
            {block: values for block, values in updates.items() if block not in self._vectors}
        )
        arrived |= {block: updates[block] for block in self._vectors}
        for block, values in arrived.items():
            self._weights[block] += values if is_local else optimizer.update(block, values)
        return taken, set(arrived)


def row_of(setting: Setting, outcomes: Sequence[Outcome], reference: Sequence[Outcome]) -> list[str]:
    """A table row: means over seeds, and gaps paired by seed."""

    def gap(name: str) -> str:
        gaps = [
            100 * (getattr(outcome, name) / getattr(other, name) - 1)
            for outcome, other in zip(outcomes, reference, strict=True)
        ]
        return f"{np.mean(gaps):+.2f}% ({min(gaps):+.2f} {max(gaps):+.2f})"

    means = {name: float(np.mean([getattr(outcome, name) for outcome in outcomes])) for name in MEANS}
    return [
        str(setting.workers), setting.push, setting.pull, setting.where, f"{means['train_bits']:.4f}",
        gap("train_bits"), f"{means['valid_bits']:.4f}", gap("valid_bits"), f"{means['push_bits']:.3f}",
        f"{means['pull_bits']:.3f}", f"{64 / (means['push_bits'] + means['pull_bits']):.1f}x",
        f"{means['residual']:.4f}", f"{means['distance']:.4f}",
    ]  # fmt: skip


def run(
    pairs: Sequence[tuple[str, str, str]],
    workers: Sequence[int],
    steps: int,
    warm_up: int,
    seeds: Sequence[int],
    hidden: int = 128,
    lr: float = 0.05,
) -> None:
    """Print the table of (push, pull, where) pairs; gaps are paired by seed with the first pair."""
    rows: list[list[str]] = []
    facts: list[dict[str, object]] = []
    for count in workers:
        reference: list[Outcome] = []
        for push, pull, where in pairs:
            settings = [Setting(push, pull, count, steps, warm_up, seed, hidden, lr, where) for seed in seeds]
            outcomes = [Simulation(setting).run() for setting in settings]
            reference = reference or outcomes
            rows.append(row_of(settings[0], outcomes, reference))
            print(*rows[-1], flush=True)
            facts += [vars(setting) | vars(outcome) for setting, outcome in zip(settings, outcomes, strict=True)]
    show(
        f"char-LSTM {hidden}, Adagrad {lr}, {steps} steps after {warm_up}: losses, and bits an encoded element",
        COLUMNS,
        rows,
        {"benchmark": "bits", "results": facts},
    )


MEANS = ("train_bits", "valid_bits", "push_bits", "pull_bits", "residual", "distance")
COLUMNS = ("N", "push", "pull", "where", "train", "gap (least most)", "valid", "gap (least most)", "push bits",
           "pull bits", "fewer", "residual", "distance")  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks bits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="of all workers together")
    parser.add_argument("--warm-up", type=int, default=300, help="steps of a plain process before")
    parser.add_argument("--workers", type=int, nargs="+", default=[8])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument(
        "pairs", nargs="*", default=["fp32,fp32", "int4,ternary", "adaptive,coded"], help="PUSH,PULL[,worker]"
    )
    given = parser.parse_args(arguments)
    pairs: list[tuple[str, str, str]] = []
    for pair in given.pairs:
        push, pull, *where = pair.split(",")
        pairs.append((push, pull, where[0] if where else "server"))
    run(pairs, given.workers, given.steps, given.warm_up, range(given.seeds), given.hidden, given.lr)
