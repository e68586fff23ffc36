"""Labelled images: the published parts, and clear words where they are missing or damaged."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.datasets import digits, mnist
from models.datasets.errors import DataError
from models.datasets.folder import VARIABLE
from models.datasets.images import Images, ImageSplits
from models.mlp.arguments import MlpArguments, MlpData
from models.mlp.data import find_data
from models.mlp.task import MlpTask, build


def _commonest(images: Images) -> float:
    """Share of the commonest class."""
    return float(np.bincount(images.labels).max() / len(images))


def _share_no_image(splits: ImageSplits) -> bool:
    seen = [{image.tobytes() for image in part.pixels} for part in (splits.train, splits.valid, splits.test)]
    return sum(map(len, seen)) == len(set.union(*seen))


# --------------------------------------------------------------------------------------- digits


def test_digits_are_1797_images_in_three_parts_that_share_none() -> None:
    splits = digits.read()
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [1437, 180, 180]
    assert splits.pixels == 64
    assert splits.train.pixels.max() == splits.brightest == 16
    assert set(splits.test.labels.tolist()) == set(range(10))
    assert _share_no_image(splits)
    assert _commonest(splits.test) == pytest.approx(0.1111, abs=5e-5), "as docs/job.md says"


def test_without_scikit_learn_the_mend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(DataError, match=r"scikit-learn, which is not installed.*pip install 'paramserver\[digits\]'"):
        find_data(MlpData(name="digits"))
    with pytest.raises(DataError, match="scikit-learn"):
        digits.read()


def _accuracy(task: MlpTask, split: str) -> float:
    rows = [task.evaluate(batch) for batch in task.batches(split, range(task.examples(split)))]
    return sum(row.metrics["accuracy"] for row in rows) / sum(row.elements for row in rows)


def test_a_net_learns_the_digits_far_beyond_the_commonest_class() -> None:
    task = build(MlpArguments(hidden=(64,)), MlpData(name="digits", batch=32), 0, torch.device("cpu"))
    assert _accuracy(task, "test") < 0.4
    for _ in range(10):
        for batch in task.batches("train", range(task.examples("train"))):
            step = task.gradients(batch)
            with torch.no_grad():
                for parameter in task.parameters():
                    parameter.tensor.sub_(step.gradients[parameter.name], alpha=0.2)
    assert _accuracy(task, "test") > 0.85


# ---------------------------------------------------------------------------------------- mnist


@pytest.mark.data
@pytest.mark.usefixtures("data_root")
def test_mnist_has_its_published_counts_and_holds_out_the_last_training_images() -> None:
    splits = mnist.read()
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [50_000, 10_000, 10_000]
    assert splits.pixels == 784
    published = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    labels = np.concatenate([splits.train.labels, splits.valid.labels])
    assert np.bincount(labels).tolist() == published
    assert np.bincount(splits.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert labels[:5].tolist() == [5, 0, 4, 1, 9], "the published order"
    assert _share_no_image(splits)
    assert _commonest(splits.test) == 0.1135, "as docs/job.md says"


def _arrays(train: int = 10_002, test: int = 3) -> dict[str, Any]:
    return {
        "x_train": np.zeros((train, 2, 2), np.uint8),
        "y_train": np.arange(train).astype(np.uint8) % 10,
        "x_test": np.zeros((test, 2, 2), np.uint8),
        "y_test": np.zeros(test, np.uint8),
    }


def _write(root: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict[str, Any]) -> Path:
    monkeypatch.setenv(VARIABLE, str(root))
    path = root / mnist.FILE
    path.parent.mkdir()
    np.savez(path, **arrays)
    return path


def test_the_last_10000_training_images_are_for_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, monkeypatch, _arrays())
    splits = mnist.read()
    assert splits.train.labels.tolist() == [0, 1]
    assert splits.valid.labels[:3].tolist() == [2, 3, 4]
    assert (len(splits.valid), len(splits.test)) == (10_000, 3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"y_test": np.zeros(4, np.uint8)}, r"test: found arrays of the shapes \(3, 2, 2\) and \(4,\)"),
        ({"x_test": np.zeros((3, 4), np.uint8)}, r"test: found arrays of the shapes \(3, 4\)"),
        ({"x_test": np.zeros((0, 2, 2), np.uint8), "y_test": np.zeros(0, np.uint8)}, "none of them empty"),
        ({"x_test": np.zeros((3, 2, 2), np.float32)}, "found pixels of type float32 up to 0.0; needed is uint8"),
        ({"y_test": np.full(3, 10, np.uint8)}, "found labels of type uint8 up to 10; needed is uint8 up to 9"),
        ({"x_train": np.zeros((9, 2, 2), np.uint8), "y_train": np.zeros(9, np.uint8)}, "found 9 training images"),
        ({"x_test": np.array([None, {}])}, "not readable as an npz archive.*pickle"),
    ],
)
def test_wrong_arrays_are_told_by_name(
    changes: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path, monkeypatch, {**_arrays(), **changes})
    with pytest.raises(DataError, match=told) as caught:
        mnist.read()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "missing array", "single array"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, monkeypatch, _arrays())
    raw = path.read_bytes()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_bytes(b"no archive")
        case "cut":
            path.write_bytes(raw[: len(raw) // 2])
        case "flipped":
            place = len(raw) // 3
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        case "missing array":
            np.savez(path, **{name: array for name, array in _arrays().items() if name != "y_test"})
        case "single array":
            with path.open("wb") as file:
                np.save(file, np.zeros(3))
    with pytest.raises(DataError, match=r"mnist.npz is not readable as an npz archive of x_train.*fetch it again"):
        mnist.read()


def test_missing_mnist_says_where_it_was_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match=f"mnist.*no file {tmp_path}.*set PARAMSERVER_DATA.*'digits'"):
        find_data(MlpData(name="mnist"))
