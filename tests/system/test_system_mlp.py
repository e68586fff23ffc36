"""MNIST from the user's side: a whole job on real processes, and the exported net."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.datasets import mnist
from models.mlp.arguments import MlpArguments
from models.mlp.net import MlpNet

JOB = """
name: mnist
seed: 3
model: {family: mlp, args: {hidden: [64]}}
data: {name: mnist, batch: 128}
cluster: {shards: 2, workers: 2}
push: {encoding: int4}
pull: {encoding: ternary}
optimizer: {name: adagrad, lr: 0.02}
stop: {epochs: 1}
"""


@pytest.mark.data
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("data_root")
def test_a_perceptron_learns_mnist_and_tells_its_accuracy(paramserver: Callable[..., Any]) -> None:
    path: Path = paramserver.directory / "mnist.yaml"  # type: ignore[attr-defined]
    path.write_text(JOB, encoding="utf-8")
    done = paramserver("run", path, "--json", seconds=200)
    result = done.json()
    folder = path.parent / "runs" / "mnist"
    assert result["state"] == "done"
    assert (result["unit"], result["symbol"]) == ("nats", "image")
    assert result["examples"] == 50_000
    assert result["steps"] == 391, "24 leases of 16 batches, and one of 848 images in 7"
    assert 0.9 < result["train"]["metrics"]["accuracy"] <= 1.0
    assert 0.9 < result["test"]["metrics"]["accuracy"] < 0.99
    for split in ("valid", "test"):
        assert result["replica"][split]["metrics"]["accuracy"] == pytest.approx(
            result[split]["metrics"]["accuracy"], abs=0.02
        )
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["metrics"] == result["train"]["metrics"]
    net = MlpNet.from_state(MlpArguments(hidden=(64,)), load_file(folder / "model.safetensors"))
    test = mnist.read().test
    with torch.no_grad():
        logits = net(torch.from_numpy(test.pixels.copy()).flatten(1).float() / 255)
    right = (logits.argmax(1) == torch.from_numpy(test.labels.copy())).float().mean().item()
    assert right == pytest.approx(result["test"]["metrics"]["accuracy"], abs=3e-4), "the export is what was evaluated"
