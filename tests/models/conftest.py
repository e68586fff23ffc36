"""Small corpora, arguments and settings for tests of models."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from models.datasets.vocabulary import Vocabulary
from models.recurrent.arguments import RecurrentArguments, RecurrentData
from models.recurrent.corpus import Corpus


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Small tensors gain nothing from a second thread and lose much to it on a busy machine.
    torch.set_num_threads(1)


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
