"""Symbols and their numbers. A vocabulary depends on nothing but the text (or on nothing at all)."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"
CODE_POINTS = 0x110000
MAX_CHARACTERS = 1_024  # kinds of character that a derived vocabulary keeps

Stream = npt.NDArray[np.int32]  # (symbols,)


@dataclass(frozen=True)
class Vocabulary:
    """The symbols in the order of their numbers; `unknown` stands for all others, if it is there."""

    symbols: tuple[str, ...]
    unknown: int | None = None

    def __len__(self) -> int:
        return len(self.symbols)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {symbol: number for number, symbol in enumerate(self.symbols)}

    def encode(self, symbols: Sequence[str]) -> Stream:
        """The numbers of a text's characters, or of a list of words.

        Raises KeyError for a symbol that is not here when there is no unknown symbol.
        """
        if isinstance(symbols, str):
            return self._encode_characters(symbols)
        if self.unknown is None:
            return np.array([self._numbers[symbol] for symbol in symbols], np.int32)
        get, unknown = self._numbers.get, self.unknown
        return np.array([get(symbol, unknown) for symbol in symbols], np.int32)

    def _encode_characters(self, text: str) -> Stream:
        table = np.full(CODE_POINTS, -1 if self.unknown is None else self.unknown, np.int32)
        for symbol, number in self._numbers.items():
            if len(symbol) == 1:
                table[ord(symbol)] = number
        stream: Stream = table[_code_points(text)]
        if self.unknown is None and stream.size and stream.min() < 0:
            raise KeyError(text[int(stream.argmin())])
        return stream


def source_characters() -> Vocabulary:
    """Printable ASCII, tab, newline and one unknown: 98 symbols, the same on every machine."""
    kept = ["\t", "\n", *sorted(set(string.printable) - set(string.whitespace) | {" "})]
    return Vocabulary((*kept, UNKNOWN), unknown=len(kept))


def characters(train: str, held_out: Iterable[str] = ()) -> Vocabulary:
    """The characters of the training text in code point order.

    An unknown symbol is added only where the held-out text needs it, or where more than
    MAX_CHARACTERS kinds occur (the rarest are dropped).
    """
    counts = _count_characters(train)
    kept = sorted(_most_frequent(counts, MAX_CHARACTERS))
    unseen = any(_count_characters(text).keys() - counts.keys() for text in held_out)
    needs_unknown = len(kept) < len(counts) or unseen
    return Vocabulary((*kept, UNKNOWN), unknown=len(kept)) if needs_unknown else Vocabulary(tuple(kept))


def words(train: Sequence[str], limit: int, held_out: Iterable[Sequence[str]] = ()) -> Vocabulary:
    """The most frequent words of the training text, at most `limit` symbols in all, ties by code point.

    The text's own `<unk>` is the unknown symbol; else one is added where words must be dropped or the
    held-out text has words of its own.
    """
    counts = Counter(train)
    unseen = any(set(part) - counts.keys() for part in held_out)
    if UNKNOWN not in counts and (len(counts) > limit or unseen):
        counts[UNKNOWN] = len(train)  # never the one that is dropped
    kept = _most_frequent(counts, limit)
    if UNKNOWN in counts and UNKNOWN not in kept:
        kept[-1] = UNKNOWN
    return Vocabulary(tuple(kept), unknown=kept.index(UNKNOWN) if UNKNOWN in kept else None)


def split_words(text: str) -> list[str]:
    """Words between blanks, with one `<eos>` a line, as language models of Penn Treebank count them."""
    found: list[str] = []
    for line in text.split("\n")[: -1 if text.endswith("\n") else None]:
        found += line.split()
        found.append(END_OF_LINE)
    return found


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _count_characters(text: str) -> dict[str, int]:
    counts = np.bincount(_code_points(text), minlength=CODE_POINTS)
    return {chr(point): int(counts[point]) for point in np.flatnonzero(counts)}


def _most_frequent(counts: Mapping[str, int], limit: int) -> list[str]:
    return sorted(counts, key=lambda symbol: (-counts[symbol], symbol))[:limit]
