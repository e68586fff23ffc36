"""The numbers of `coded` that both its tables and its kernels need. All of them are part of the wire format."""

from __future__ import annotations

SEGMENT = 2048  # elements that share a class
STATES = 4  # range coders that take turns
PROBABILITY_BITS = 12

PAIR_LARGEST = 4  # in most classes a symbol is two codes of -4..4
PAIR_SIDE = 2 * PAIR_LARGEST + 1
SINGLE_LARGEST = 40  # in classes of wide spread it is one code of -40..40
ESCAPE = PAIR_SIDE * PAIR_SIDE  # other codes follow it, one byte each
SYMBOLS = ESCAPE + 1

# Shares of the codes that are not zero, in 65536ths: four thirds of the last one.
SHARES = (164, 218, 291, 388, 518, 690, 920, 1227, 1636, 2181, 2908, 3878, 5170, 6894, 9192, 12256, 16341, 21788,
          29050, 38734, 48000, 56000, 62000)  # fmt: skip
# Of the codes of at least k, so many in 65536ths are at least k + 1.
EXCESSES = (328, 1311, 3277, 6554, 13107, 22938, 36045)
# Ratios between the probabilities of neighbouring magnitudes, in 65536ths, where codes spread wide.
SPREADS = (40000, 49000, 54600, 58000, 60300, 61800, 62900, 63700)

ALL_ZERO = 0


def pair_class(share: int, excess: int) -> int:
    return 1 + share * len(EXCESSES) + excess


def single_class(spread: int) -> int:
    return 1 + len(SHARES) * len(EXCESSES) + spread


RAW = single_class(len(SPREADS))  # one code of -128..127, all alike: no frame is longer than so
CLASSES = RAW + 1
