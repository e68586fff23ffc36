"""The installed model families, found by their entry points. No family's tensor library is imported here.

Code of a model comes from installed packages only. An operator may allow some of them (`--allow-family`): the others
are then not even imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
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


class FamiliesError(ValueError):
    """A family that is allowed but not installed; the text says which, and what to do."""


_allowed: frozenset[str] | None = None  # None: all that are installed


def allow_families(names: Iterable[str]) -> None:
    """Let this process load only the families of these names; all where there are none. Raises FamiliesError.

    Called once, when the process starts.
    """
    global _allowed
    wanted = frozenset(names)
    missing = sorted(wanted - _installed())
    if missing:
        raise FamiliesError(
            f"--allow-family: there is no model family {missing[0]!r} here (installed: "
            f"{', '.join(sorted(_installed())) or 'none'}); install its package, or allow another"
        )
    _allowed = wanted or None
    families.cache_clear()


@cache
def families() -> dict[str, FamilyLike]:
    """The installed and allowed model families by name; importing one imports no tensor library."""
    points = entry_points(group=FAMILIES_GROUP)
    return {
        point.name: cast(FamilyLike, point.load()) for point in points if _allowed is None or point.name in _allowed
    }


def known_families() -> str:
    """The families that a job may name, for a message; and those that it may not name here."""
    kept_out = _installed() - families().keys()
    known = ", ".join(sorted(families())) or "none installed"
    return known + (f"; not allowed here: {', '.join(sorted(kept_out))}" if kept_out else "")


def _installed() -> frozenset[str]:
    return frozenset(point.name for point in entry_points(group=FAMILIES_GROUP))


def load_function(reference: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, name = reference.partition(":")
    return cast(Callable[..., Any], getattr(importlib.import_module(module), name))
