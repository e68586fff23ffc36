"""What a job may say of a recurrent net and its text. Torch-free: checked where torch is not installed.

Every default is on one line with its meaning. What depends on both `model.args` and `data` is avoided,
because the two are checked apart.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

DEFAULT_WORDS = 10_000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RecurrentArguments(_Section):
    """`model.args` of family `recurrent`."""

    task: Literal["char-lm", "word-lm"]  # what a symbol is
    cell: Literal["rnn", "lstm", "gru"] = "lstm"  # rnn: tanh
    hidden: Annotated[int, Field(ge=1, le=8192)] = 200  # units a layer
    embedding: Annotated[int, Field(ge=1, le=8192)] | None = None  # width of a symbol's vector; absent: hidden
    layers: Annotated[int, Field(ge=1, le=16)] = 1
    tied: bool = False  # the output layer uses the embedding's weights
    vocabulary: Annotated[int, Field(ge=2, le=1_000_000)] | None = None  # word-lm: symbols in all; absent: 10,000
    init_scale: Annotated[float, Field(gt=0)] | None = None  # uniform in +-scale; absent: 1/sqrt(hidden)
    forget_bias: float = 0.0  # lstm: first value of the forget gate's bias; more remembers longer and learns later

    @property
    def embedding_width(self) -> int:
        return self.hidden if self.embedding is None else self.embedding

    @property
    def words(self) -> int:
        """Symbols that a word-level vocabulary has at most."""
        return DEFAULT_WORDS if self.vocabulary is None else self.vocabulary

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.tied and self.embedding_width != self.hidden:
            raise ValueError(
                f"tied output needs embedding == hidden, found embedding {self.embedding} and hidden {self.hidden}; "
                "make them equal, leave embedding out, or set tied: false"
            )
        if self.vocabulary is not None and self.task != "word-lm":
            raise ValueError(
                f"vocabulary limits the words of task 'word-lm', found with task {self.task!r}; leave it out"
            )
        return self


class RecurrentData(_Section):
    """`data` of family `recurrent`: the text and how its stream is cut."""

    name: Literal["python-source", "ptb", "shakespeare", "text-file"] = "python-source"
    path: Annotated[str, Field(min_length=1)] | None = None  # text-file only: a UTF-8 text
    batch: Annotated[int, Field(ge=1, le=4096)] = 16  # segments that run side by side
    window: Annotated[int, Field(ge=1, le=4096)] = 64  # symbols of one truncated back-propagation
    windows: Annotated[int, Field(ge=1, le=4096)] = 16  # windows of a segment; the state is carried inside it
    # Training text; validation and test keep a twentieth. Absent: 2,000,000 of python-source, all of others.
    max_chars: Annotated[int, Field(ge=1_000)] | None = None

    @property
    def segment(self) -> int:
        """Symbols that one segment predicts."""
        return self.window * self.windows

    @model_validator(mode="after")
    def _path_fits(self) -> Self:
        if self.name == "text-file" and self.path is None:
            raise ValueError("name 'text-file' needs path: the UTF-8 text to train on")
        if self.name != "text-file" and self.path is not None:
            raise ValueError(f"path belongs to name 'text-file', found with name {self.name!r}; leave one of them out")
        return self
