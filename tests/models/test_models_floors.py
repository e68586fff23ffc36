"""The floors are cross-entropies of proper distributions, known in closed form on small streams."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from models.recurrent.corpus import Corpus
from models.recurrent.floors import Bigram, Unigram, floors

ALTERNATING = np.array([0, 1] * 8, np.int32)


def test_unigram_bits_of_a_known_stream() -> None:
    # Add-one over 16 symbols of 3 kinds: 9/19, 9/19, 1/19; the first symbol is not predicted.
    assert Unigram(ALTERNATING, 3).bits(np.array([2, 0, 2], np.int32)) == pytest.approx(
        (-math.log2(9 / 19) - math.log2(1 / 19)) / 2
    )


def test_bigram_bits_of_a_known_stream() -> None:
    bigram = Bigram.fit(ALTERNATING, 2, strength=1.0)  # 8 pairs (0, 1), 7 pairs (1, 0); P(symbol) = 9/18
    assert bigram.bits(np.array([0, 1, 0], np.int32)) == pytest.approx(
        (-math.log2((8 + 0.5) / 9) - math.log2((7 + 0.5) / 8)) / 2
    )
    assert bigram.bits(np.array([1, 1], np.int32)) == pytest.approx(-math.log2(0.5 / 8))


def test_bigram_probabilities_sum_to_one_even_after_an_unseen_symbol() -> None:
    bigram = Bigram.fit(ALTERNATING, 4, strength=0.3)
    for before in range(4):
        total = sum(2 ** -bigram.bits(np.array([before, after], np.int32)) for after in range(4))
        assert total == pytest.approx(1)


def test_tuning_takes_the_best_strength() -> None:
    generator = np.random.default_rng(0)
    stream = generator.integers(0, 9, 400).astype(np.int32)
    valid = generator.integers(0, 9, 400).astype(np.int32)
    fitted = Bigram.fit(stream, 9)
    tuned = fitted.tuned(valid, (0.01, 1.0, 1000.0))
    # Independent symbols: pairs tell nothing, so the strongest prior is best.
    assert tuned.strength == 1000.0
    assert tuned.bits(valid) < fitted.bits(valid)


def test_floors_are_ordered_on_text_with_structure(make_corpus: Callable[..., Corpus]) -> None:
    corpus = make_corpus()
    skewed = np.repeat(np.array([0, 1, 0, 2], np.int32), 2)
    streams = {name: np.tile(skewed, 50) for name in ("train", "valid", "test")}
    found = floors(Corpus(streams, corpus.vocabulary))
    assert found.uniform == pytest.approx(math.log2(7))
    assert found.bigram < found.unigram < found.uniform
