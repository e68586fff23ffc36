"""From a data set's name to streams of symbol numbers, and from a stream to segments. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.datasets import ptb, python_source, shakespeare, text_file, vocabulary
from models.datasets.errors import DataError
from models.datasets.text import Splits
from models.datasets.vocabulary import Stream, Vocabulary
from models.recurrent.arguments import RecurrentArguments, RecurrentData

SPLITS = ("train", "valid", "test")
NOT_PREDICTED = -1  # a target beyond the end of the stream


def find_data(data: RecurrentData) -> None:
    """Raises DataError where the text is not on this machine; reads only a text file named by path."""
    match data.name:
        case "python-source":
            python_source.find()
        case "ptb":
            ptb.find()
        case "shakespeare":
            shakespeare.find()
        case "text-file":
            text_file.read(_path(data))


def read_splits(data: RecurrentData) -> Splits:
    """The text in three parts, within `max_chars`. Raises DataError."""
    match data.name:
        case "python-source":
            return python_source.read(data.max_chars)
        case "ptb":
            splits = ptb.read()
        case "shakespeare":
            splits = shakespeare.read()
        case "text-file":
            splits = text_file.read(_path(data))
    return splits.limited(data.max_chars)


def _path(data: RecurrentData) -> str:
    assert data.path is not None, "the schema asks for a path"
    return data.path


@dataclass(frozen=True)
class Corpus:
    """Streams of symbol numbers by split, read only."""

    streams: Mapping[str, Stream]  # (symbols,)
    vocabulary: Vocabulary


def load_corpus(arguments: RecurrentArguments, data: RecurrentData) -> Corpus:
    """Read and number the text. Raises DataError for text that is missing or too short for one segment."""
    splits = read_splits(data)
    texts: dict[str, Sequence[str]] = {name: getattr(splits, name) for name in SPLITS}
    if arguments.task == "word-lm":
        texts = {name: vocabulary.split_words(getattr(splits, name)) for name in SPLITS}
        known = vocabulary.words(texts["train"], arguments.words, (texts["valid"], texts["test"]))
    elif data.name == "python-source":
        known = vocabulary.source_characters()
    else:
        known = vocabulary.characters(splits.train, (splits.valid, splits.test))
    streams = {name: known.encode(text) for name, text in texts.items()}
    _check_lengths(streams, data)
    return Corpus(streams, known)


def _check_lengths(streams: Mapping[str, Stream], data: RecurrentData) -> None:
    needed = {"train": data.segment + 1, "valid": 2, "test": 2}
    for split, least in needed.items():
        found = len(streams[split])
        if found < least:
            raise DataError(
                f"data set {data.name!r}: the {split} part has {found} symbols, at least {least} are needed "
                f"(one segment is window {data.window} x windows {data.windows}); give more text, raise max_chars, "
                "or make the segments shorter"
            )


def count_segments(stream: Stream, segment: int, split: str) -> int:
    """Segments of `segment` predicted symbols. Together they predict every symbol but the first, once each.

    The last one may be shorter in validation and test; in training what does not fill a segment is left
    out, since a few symbols would make a step as large as a full batch does.
    """
    predicted = len(stream) - 1
    return predicted // segment if split == "train" else -(-predicted // segment)


def cut_segments(stream: Stream, segment: int, examples: Sequence[int]) -> tuple[Stream, Stream]:
    """Inputs and targets of some segments, both (examples, segment).

    Example i predicts the symbols [i * segment + 1, (i + 1) * segment + 1) of the stream. Targets beyond
    its end are NOT_PREDICTED; the inputs there are symbol 0.
    """
    inputs = np.zeros((len(examples), segment), np.int32)
    targets = np.full((len(examples), segment), NOT_PREDICTED, np.int32)
    for row, example in enumerate(examples):
        piece = stream[example * segment : (example + 1) * segment + 1]
        inputs[row, : len(piece) - 1] = piece[:-1]
        targets[row, : len(piece) - 1] = piece[1:]
    return inputs, targets
