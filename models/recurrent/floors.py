"""What counting alone reaches: unigram and bigram cross-entropy over the same symbols. Torch-free.

A net that does not beat the bigram model has learned nothing about order. Both are fitted on the
training stream; the bigram's one setting is tuned on the validation stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.datasets.vocabulary import Stream
from models.recurrent.corpus import Corpus

# Strengths of the prior, in counts; from nearly none to nearly the unigram model.
STRENGTHS = tuple(float(f"{10**exponent:.3g}") for exponent in np.arange(-2, 4.25, 0.25))


class Unigram:
    """P(symbol) with one count added to each symbol."""

    def __init__(self, train: Stream, symbols: int) -> None:
        counts = np.bincount(train, minlength=symbols).astype(np.float64)
        self.probabilities: npt.NDArray[np.float64] = (counts + 1) / (len(train) + symbols)  # (symbols,)

    def bits(self, stream: Stream) -> float:
        """Cross-entropy in bits a symbol of all symbols but the first, as the net is measured."""
        return float(-np.log2(self.probabilities[stream[1:]]).mean())


@dataclass(frozen=True)
class Bigram:
    """P(b | a) = (count(a, b) + strength * P(b)) / (count(a) + strength): MacKay & Peto, 1995, eq. 5.

    Only pairs that occur are stored, so a vocabulary of 10,000 words needs no 10^8 counts.
    """

    unigram: Unigram
    strength: float
    before: npt.NDArray[np.int64]  # (symbols,) how often each symbol has a successor
    pairs: npt.NDArray[np.int64]  # (pairs,) a * symbols + b, ascending
    counts: npt.NDArray[np.int64]  # (pairs,)

    @classmethod
    def fit(cls, train: Stream, symbols: int, strength: float = 1.0) -> Bigram:
        """Count the pairs of a stream of at least two symbols."""
        pairs, counts = np.unique(_pairs(train, symbols), return_counts=True)
        before = np.bincount(train[:-1], minlength=symbols)
        return cls(Unigram(train, symbols), strength, before, pairs, counts)

    def tuned(self, valid: Stream, strengths: Iterable[float] = STRENGTHS) -> Bigram:
        """The same counts with the strength that gives the validation stream the fewest bits."""
        candidates = [Bigram(self.unigram, strength, self.before, self.pairs, self.counts) for strength in strengths]
        return min(candidates, key=lambda candidate: candidate.bits(valid))

    def bits(self, stream: Stream) -> float:
        """Cross-entropy in bits a symbol of all symbols but the first."""
        wanted = _pairs(stream, len(self.before))
        place = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        seen = np.where(self.pairs[place] == wanted, self.counts[place], 0)
        prior = self.strength * self.unigram.probabilities[stream[1:]]
        return float(-np.log2((seen + prior) / (self.before[stream[:-1]] + self.strength)).mean())


def _pairs(stream: Stream, symbols: int) -> npt.NDArray[np.int64]:
    return stream[:-1].astype(np.int64) * symbols + stream[1:]


@dataclass(frozen=True)
class Floors:
    """Bits a symbol of one split: uniform guessing, counting symbols, counting pairs."""

    uniform: float
    unigram: float
    bigram: float


def floors(corpus: Corpus, split: str = "valid") -> Floors:
    """The floors of a split. About a second for a million symbols."""
    train, stream, symbols = corpus.streams["train"], corpus.streams[split], len(corpus.vocabulary)
    bigram = Bigram.fit(train, symbols).tuned(corpus.streams["valid"])
    return Floors(math.log2(symbols), bigram.unigram.bits(stream), bigram.bits(stream))
