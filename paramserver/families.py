"""The installed model families, found by their entry points. No family's tensor library is imported here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any, cast

from pydantic import BaseModel

FAMILIES_GROUP = "paramserver.families"


class FamilyLike:
    """What an entry point in `paramserver.families` must offer (models.family.Family does)."""

    name: str
    arguments: type[BaseModel]
    data: type[BaseModel]
    task: str
    find_data: str
    symbol: Callable[[Any], str]
    unit: str
    lease_examples: Callable[[Any], int]


@cache
def families() -> dict[str, FamilyLike]:
    """The installed model families by name; importing one imports no tensor library."""
    return {point.name: cast(FamilyLike, point.load()) for point in entry_points(group=FAMILIES_GROUP)}


def load_function(reference: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, name = reference.partition(":")
    return cast(Callable[..., Any], getattr(importlib.import_module(module), name))
