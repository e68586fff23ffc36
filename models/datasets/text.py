"""A text in three parts, and the one rule by which a limit on its size cuts them."""

from __future__ import annotations

from dataclasses import dataclass

# A validation or test part of one twentieth is what a 90/5/5 split gives.
HELD_OUT_SHARE = 20


@dataclass(frozen=True)
class Splits:
    """One text in three parts that share no character."""

    train: str
    valid: str
    test: str

    def limited(self, max_chars: int | None) -> Splits:
        """The first `max_chars` characters of train and a twentieth as many of the others; None keeps all."""
        if max_chars is None:
            return self
        held_out = max_chars // HELD_OUT_SHARE
        return Splits(self.train[:max_chars], self.valid[:held_out], self.test[:held_out])


def split_by_position(text: str) -> Splits:
    """The first 90% for training, the next 5% for validation, the last 5% for test."""
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    return Splits(text[:first], text[first:second], text[second:])
