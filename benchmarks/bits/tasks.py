"""The tasks of the comparison, each small enough that a cell of it takes well under a minute on one core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Budget:
    """A task, and how long it is trained. `model` and `data` are those of a job."""

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    lr: float  # of Adagrad
    warm_up: int  # steps of one process before the workers begin
    steps: int  # of all workers together

    def job(self, name: str, seed: int, workers: int) -> dict[str, Any]:
        """What all jobs on the task have in common; push, pull and `optimizer.where` are the setting's."""
        return {
            "name": name,
            "seed": seed,
            "device": "cpu",
            "model": dict(self.model),
            "data": dict(self.data),
            "cluster": {"shards": 2, "workers": workers},
            "optimizer": {"name": "adagrad", "lr": self.lr, "clip": 1.0},
        }


TASKS: dict[str, Budget] = {
    # 157,282 parameters.
    "char-lm": Budget(
        model={"family": "recurrent", "args": {"task": "char-lm", "cell": "lstm", "hidden": 128}},
        data={"name": "python-source", "batch": 16, "window": 32, "windows": 16, "max_chars": 1_000_000},
        lr=0.05,
        warm_up=300,
        steps=600,
    ),
    # 390,096 parameters: the 2,000 most frequent words, for the softmax over all 10,000 takes five times as long.
    "word-lm": Budget(
        model={
            "family": "recurrent",
            "args": {"task": "word-lm", "cell": "lstm", "hidden": 128, "tied": True, "vocabulary": 2000},
        },
        data={"name": "ptb", "batch": 16, "window": 16, "windows": 16, "max_chars": 1_500_000},
        lr=0.1,
        warm_up=300,
        steps=600,
    ),
    # 101,770 parameters.
    "mlp": Budget(
        model={"family": "mlp", "args": {"hidden": [128]}},
        data={"name": "mnist", "batch": 64},
        lr=0.02,
        warm_up=600,
        steps=1000,
    ),
}
