"""How a model family announces itself: an entry point in the group `paramserver.families`.

This file imports no torch, so that a job is checked where torch is not installed. A user's own
installed package announces its family in the same way and works like ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel


def _symbol(arguments: BaseModel) -> str:
    return "symbol"


def _lease_examples(data: BaseModel) -> int:
    examples: int = getattr(data, "batch", 1)
    return examples


@dataclass(frozen=True)
class Family:
    """A model family.

    `arguments` checks `model.args`; `data` checks everything under `data`. Both forbid unknown fields.
    `task` is "module:function", imported only by workers; the function takes
    (arguments, data, seed, device) and returns a models.task.Task.
    `find_data` is "module:function", torch-free; it takes `data` and raises ValueError with a clear
    message where the data is not on this machine.
    `symbol` says for checked arguments what one predicted element is, in a word, and `unit` what its losses are
    told in: bits a character, bits a word, nats an image.
    `lease_examples` says for checked data how many examples a lease holds; else it is `batch`. Every lease
    is granted and reported, so where a batch takes a millisecond, a lease had better hold several.
    """

    name: str
    arguments: type[BaseModel]
    data: type[BaseModel]
    task: str
    find_data: str
    symbol: Callable[[Any], str] = _symbol
    unit: Literal["bits", "nats"] = "bits"
    lease_examples: Callable[[Any], int] = _lease_examples

    def check(self, arguments: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[BaseModel, BaseModel]:
        """Both checked; raises pydantic.ValidationError."""
        return self.arguments.model_validate(arguments), self.data.model_validate(data)
