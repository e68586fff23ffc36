"""Tests of data sets skip where the data is absent, and fail there in CI: absence must be seen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.datasets.folder import VARIABLE
from models.datasets.vocabulary import Vocabulary
from models.recurrent.arguments import RecurrentArguments, RecurrentData
from models.recurrent.corpus import Corpus


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Small tensors gain nothing from a second thread and lose much to it on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture
def data_root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the published data sets; PARAMSERVER_DATA, or else ../shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    root = Path(os.environ.get(VARIABLE) or beside)
    if not (root / "ptb").is_dir():
        reason = f"no data sets in {root}; set {VARIABLE} to the folder that holds ptb/ and shakespeare/"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    monkeypatch.setenv(VARIABLE, str(root))
    return root


@pytest.fixture
def make_corpus() -> Callable[..., Corpus]:
    """A corpus of seeded random symbols: make_corpus(train=..., valid=..., symbols=...)."""

    def make(train: int = 2000, valid: int = 50, symbols: int = 7) -> Corpus:
        generator = np.random.default_rng(5)
        streams = {
            name: generator.integers(0, symbols, size).astype(np.int32)
            for name, size in (("train", train), ("valid", valid), ("test", valid))
        }
        return Corpus(streams, Vocabulary(tuple("abcdefghijklmnopqrstuvwxyz"[:symbols])))

    return make


@pytest.fixture
def small_arguments() -> RecurrentArguments:
    return RecurrentArguments(task="char-lm", hidden=6, embedding=5, layers=2)


@pytest.fixture
def small_data() -> RecurrentData:
    return RecurrentData(batch=3, window=4, windows=3)
