"""`coded` and `adaptive` on drawn and on real values: bits an element, what they lose, nanoseconds an element.

Real values come from the char-LSTM of plain.py, trained by Adagrad for some hundred steps and published every two by
`coded` against the published replica: the deltas, and the gradients, of the last steps. `int4` and `ternary` beside
them are the plain members. One thread, blocks of 2^18 elements that stay in the cache; rounds alternate.

    python -m benchmarks coding --steps 300
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.plain import make_optimizer, training_batches
from benchmarks.report import median, show
from models.recurrent.arguments import RecurrentArguments, RecurrentData
from models.recurrent.corpus import load_corpus
from models.recurrent.task import RecurrentTask
from paramserver.encoding import make_encoding
from paramserver.encoding.coded import Coded, StepPolicy, round_step
from paramserver.protocol.layout import BLOCK_ELEMENTS

Float32 = npt.NDArray[np.float32]

MEMBERS = ("int4", "ternary", "adaptive", "coded:1.5", "coded:2", "coded:3")


@dataclass
class Cell:
    """Times are medians, in nanoseconds an element; `lost` is the share of the squares that a frame does not hold."""

    values: str
    member: str
    bits: float
    lost: float
    encode_ns: float
    decode_add_ns: float
    memcpy_ns: float


def drawn(name: str, elements: int = BLOCK_ELEMENTS) -> Float32:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(elements) if name == "normal" else generator.laplace(size=elements)
    return values.astype(np.float32)


def real(steps: int, hidden: int) -> dict[str, Float32]:
    """Deltas and gradients of the matrices of a char-LSTM, joined, at the last of these steps."""
    torch.set_num_threads(1)
    arguments = RecurrentArguments(task="char-lm", cell="lstm", hidden=hidden)
    data = RecurrentData(name="python-source", max_chars=1200 * steps + 100_000)
    task = RecurrentTask(arguments, data, load_corpus(arguments, data), 0, torch.device("cpu"))
    named = {one.name: one.tensor for one in task.parameters()}
    matrices = {name: one.detach().view(-1).numpy() for name, one in named.items() if one.dim() > 1}
    published = {name: values.copy() for name, values in matrices.items()}
    policy, stepper = StepPolicy(), make_optimizer("adagrad", list(named.values()), 0.05)
    coded = make_encoding("coded")
    found: dict[str, Float32] = {}
    for step, window in zip(range(1, steps + 1), training_batches(task, data.batch, 0), strict=False):
        for name, gradient in task.gradients(window).gradients.items():
            named[name].grad = gradient
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        stepper.step()
        if step % 2 == 0:
            found["deltas"] = np.concatenate([matrices[name] - published[name] for name in matrices])
            found["gradients"] = np.concatenate([np.asarray(named[name].grad).ravel() for name in matrices])
            for block, name in enumerate(matrices):
                frame = np.empty(coded.frame_bytes(matrices[name].size), np.uint8)
                policy.publish(block, matrices[name], published[name], frame)
    return {name: values[:BLOCK_ELEMENTS] for name, values in found.items()}


class Subject:
    """One member on one array: an encoder with its buffers, and a frame to decode."""

    def __init__(self, member: str, values: Float32) -> None:
        kind, _, relative = member.partition(":")
        self._encoding = make_encoding(kind)
        self._values, self._residual, self._out = values, np.zeros_like(values), np.zeros_like(values)
        self._frame = np.empty(self._encoding.frame_bytes(values.size), np.uint8)
        squares = float(np.square(values, dtype=np.float64).sum())
        self._step = round_step(float(relative or 0) * (squares / values.size) ** 0.5)
        self.frame = self._frame[: self.encode()].copy()
        self.lost = float(np.square(self._residual, dtype=np.float64).sum()) / squares

    def encode(self) -> int:
        """Encode with a residual of zeros; the bytes."""
        self._residual.fill(0)
        if isinstance(self._encoding, Coded):
            return self._encoding.encode_with_step(self._values, self._frame, self._residual, self._step)[0]
        return self._encoding.encode(self._values, self._frame, self._residual)

    def decode_add(self) -> None:
        self._encoding.decode_add(self.frame, self._out)


def measure(name: str, values: Float32, members: Sequence[str], rounds: int) -> list[Cell]:
    """Every member on the same values, in turns."""
    subjects = [Subject(member, values) for member in members]
    encodes: list[list[float]] = [[] for _ in members]
    decodes: list[list[float]] = [[] for _ in members]
    copies, copied = [], np.empty_like(values)
    for _ in range(rounds):
        copies.append(seconds(lambda: np.copyto(copied, values)))
        for subject, encoding, decoding in zip(subjects, encodes, decodes, strict=True):
            encoding.append(seconds(subject.encode))
            decoding.append(seconds(subject.decode_add))
    a_second = 1e9 / values.size
    return [
        Cell(
            name,
            member,
            8 * subject.frame.size / values.size,
            subject.lost,
            a_second * median(encoding),
            a_second * median(decoding),
            a_second * median(copies),
        )
        for member, subject, encoding, decoding in zip(members, subjects, encodes, decodes, strict=True)
    ]


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def run(steps: int, hidden: int, rounds: int) -> None:
    """Print the table."""
    sets = {"normal": drawn("normal"), "Laplace": drawn("laplace"), **real(steps, hidden)}
    cells = [cell for name, values in sets.items() for cell in measure(name, values, MEMBERS, rounds)]
    show(
        "encodings with few bits: size, loss of one frame, time an element",
        ("values", "member", "bits", "squares lost", "encode ns", "decode + add ns", "memcpy ns"),
        [
            [cell.values, cell.member, f"{cell.bits:.3f}", f"{cell.lost:.4f}", f"{cell.encode_ns:.2f}",
             f"{cell.decode_add_ns:.2f}", f"{cell.memcpy_ns:.2f}"]
            for cell in cells
        ],
        {"benchmark": "coding", "cells": [asdict(cell) for cell in cells]},
    )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks coding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=51)
    given = parser.parse_args(arguments)
    run(given.steps, given.hidden, given.rounds)
