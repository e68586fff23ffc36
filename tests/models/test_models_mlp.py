"""The multi-layer perceptron: what a lease is, and that its gradients and export are those of a plain module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.datasets.images import Images, ImageSplits
from models.mlp.arguments import MlpArguments, MlpData
from models.mlp.family import FAMILY
from models.mlp.net import MlpNet
from models.mlp.task import MlpTask

CPU = torch.device("cpu")
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


@pytest.fixture
def images() -> ImageSplits:
    """Random images of 3 x 4 pixels with shades 0..16, in 5 classes: 40, 11 and 7 of them."""
    dice = np.random.default_rng(3)

    def some(count: int) -> Images:
        return Images(dice.integers(0, 17, (count, 3, 4), np.uint8), dice.integers(0, 5, count, np.uint8))

    return ImageSplits(some(40), some(11), some(7), brightest=16, classes=5)


def make_task(images: ImageSplits, *, seed: int = 1, batch: int = 4, **arguments: object) -> MlpTask:
    checked = MlpArguments.model_validate({"hidden": [6, 5], **arguments})
    return MlpTask(checked, MlpData(batch=batch, batches=3), images, seed, CPU)


def plain_net(activation: str, state: dict[str, Tensor]) -> nn.Sequential:
    """The same network written out with torch's own modules, pixels 12 -> 6 -> 5 -> classes 5."""
    act = ACTIVATIONS[activation]
    net = nn.Sequential(nn.Linear(12, 6), act(), nn.Linear(6, 5), act(), nn.Linear(5, 5))
    net.load_state_dict({f"{2 * int(key.split('.')[1])}.{key.split('.')[2]}": value for key, value in state.items()})
    return net


# --------------------------------------------------------------------------------------- leases


def test_a_lease_runs_as_full_batches_of_its_images_in_order_and_a_rest(images: ImageSplits) -> None:
    examples = [7, 0, 39, 12, 3, 3, 20, 1, 8, 9]
    batches = list(make_task(images).batches("train", examples))
    assert [len(batch.labels) for batch in batches] == [4, 4, 2]
    pixels, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("pixels", "labels"))
    assert labels.tolist() == images.train.labels[examples].tolist()
    assert torch.equal(pixels, torch.from_numpy(images.train.pixels[examples].reshape(10, 12) / np.float32(16)))


def test_a_lease_holds_so_many_batches_as_the_job_says() -> None:
    assert FAMILY.lease_examples(MlpData(batch=100, batches=7)) == 700
    assert FAMILY.lease_examples(MlpData()) == 128 * 16


def test_the_counts_of_examples_are_those_of_the_parts(images: ImageSplits) -> None:
    task = make_task(images)
    assert [task.examples(split) for split in ("train", "valid", "test")] == [40, 11, 7]


def test_unknown_examples_and_splits_are_refused(images: ImageSplits) -> None:
    task = make_task(images)
    with pytest.raises(IndexError, match="example 11 of split 'valid' does not exist; it has 11"):
        task.batches("valid", [0, 11])
    with pytest.raises(IndexError, match="example -1"):
        task.batches("valid", [-1])
    with pytest.raises(KeyError, match="dev"):
        task.examples("dev")


# ------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loss_gradients_and_accuracy_are_those_of_the_plain_module(images: ImageSplits, activation: str) -> None:
    task = make_task(images, activation=activation)
    plain = plain_net(activation, dict(task.export()))
    batch = next(task.batches("train", [4, 9, 1, 17]))
    logits = plain(batch.pixels)
    loss = F.cross_entropy(logits, batch.labels)
    loss.backward()
    step = task.gradients(batch)
    assert step.loss == pytest.approx(loss.item(), rel=1e-6)
    assert step.elements == 4
    assert step.metrics == {"accuracy": int((logits.argmax(1) == batch.labels).sum())}
    assert list(step.gradients) == [parameter.name for parameter in task.parameters()]
    for mine, other in zip(step.gradients.values(), plain.parameters(), strict=True):
        assert other.grad is not None
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, other.grad)


def test_an_evaluation_adds_up_over_batches(images: ImageSplits) -> None:
    task, whole = make_task(images), make_task(images, batch=11)
    parts = [task.evaluate(batch) for batch in task.batches("valid", range(11))]
    (all_at_once,) = [whole.evaluate(batch) for batch in whole.batches("valid", range(11))]
    assert [part.elements for part in parts] == [4, 4, 3]
    assert sum(part.loss_sum for part in parts) == pytest.approx(all_at_once.loss_sum, rel=1e-5)
    assert sum(part.metrics["accuracy"] for part in parts) == all_at_once.metrics["accuracy"]


def test_an_accuracy_counts_the_images_that_are_right(images: ImageSplits) -> None:
    task = make_task(images, hidden=[])
    weight, bias = (parameter.tensor for parameter in task.parameters())
    with torch.no_grad():
        weight.zero_()
        bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]))  # always class 2
    right = [task.evaluate(batch).metrics["accuracy"] for batch in task.batches("valid", range(11))]
    assert 0 < sum(right) == (images.valid.labels == 2).sum()


def test_a_layer_is_a_group(images: ImageSplits) -> None:
    groups = {parameter.name: parameter.group for parameter in make_task(images).parameters()}
    assert groups["layers.0.weight"] == groups["layers.0.bias"] == "layers.0"
    assert set(groups.values()) == {"layers.0", "layers.1", "layers.2"}


# --------------------------------------------------------------------------------------- weights


def test_first_weights_follow_from_the_seed_alone(images: ImageSplits) -> None:
    first = make_task(images).export()
    torch.rand(7)
    again, other = make_task(images).export(), make_task(images, seed=2).export()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_first_weights_are_spread_as_those_of_torch(images: ImageSplits) -> None:
    state = make_task(images, hidden=[400]).export()
    torch.manual_seed(0)
    for number, plain in enumerate((nn.Linear(12, 400), nn.Linear(400, 5))):
        for kind in ("weight", "bias"):
            own, theirs = state[f"layers.{number}.{kind}"], getattr(plain, kind)
            assert own.shape == theirs.shape
            assert own.abs().max() <= 1 / plain.in_features**0.5
            if own.numel() > 100:
                assert own.std().item() == pytest.approx(theirs.std().item(), rel=0.1)


def test_the_export_loads_into_the_plain_module(images: ImageSplits, tmp_path: Path) -> None:
    task = make_task(images, activation="tanh")
    save_file(dict(task.export()), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    net = MlpNet.from_state(MlpArguments(hidden=(6, 5), activation="tanh"), state)
    batch = next(task.batches("test", range(4)))
    assert torch.equal(net(batch.pixels), task.net(batch.pixels))
    torch.testing.assert_close(plain_net("tanh", state)(batch.pixels), net(batch.pixels))
    with pytest.raises(RuntimeError, match=r"3 hidden layers has a layers\.3\.weight"):
        MlpNet.from_state(MlpArguments(hidden=(6, 5, 5)), state)


def test_steps_down_the_gradient_fit_the_images(images: ImageSplits) -> None:
    task = make_task(images, batch=40, hidden=[64])
    losses = []
    for _ in range(300):
        step = task.gradients(next(task.batches("train", range(40))))
        losses.append(step.loss)
        with torch.no_grad():
            for parameter in task.parameters():
                parameter.tensor.sub_(step.gradients[parameter.name], alpha=0.5)
    assert losses[0] == pytest.approx(np.log(5), rel=0.1)
    assert step.metrics["accuracy"] == 40


# ------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("schema", "given", "place"),
    [
        (MlpArguments, {"hidden": [0]}, ("hidden", 0)),
        (MlpArguments, {"hidden": 128}, ("hidden",)),
        (MlpArguments, {"hidden": [8] * 17}, ("hidden",)),
        (MlpArguments, {"activation": "gelu"}, ("activation",)),
        (MlpArguments, {"dropout": 0.5}, ("dropout",)),
        (MlpData, {"name": "cifar"}, ("name",)),
        (MlpData, {"batches": 0}, ("batches",)),
        (MlpData, {"window": 64}, ("window",)),
    ],
)
def test_a_wrong_field_is_named(schema: type, given: dict[str, object], place: tuple[object, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(given)
    assert caught.value.errors()[0]["loc"] == place


def test_a_job_is_checked_without_torch() -> None:
    script = (
        "import sys; from models.mlp.family import FAMILY; from models.mlp import data\n"
        "FAMILY.check({'hidden': [3]}, {'name': 'digits'}); print(sorted({'torch', 'sklearn'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"
