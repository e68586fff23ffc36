"""Errors of a checked document in plain words: where, what was found, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, source: str, schema: type[BaseModel], prefix: str = "") -> str:
    """What pydantic found wrong with a document of this schema: one line a problem, with where, found and allowed.

    `prefix` is where in the source the document begins, for example "model.args".
    """
    lines = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        where = ".".join(([prefix] if prefix else []) + path) or "job"
        match problem["type"]:
            case "extra_forbidden":
                fields = _fields_at(schema, path[:-1])
                what = f"unknown field{nearest(path[-1], fields)} (allowed: {', '.join(sorted(fields))})"
            case "missing":
                what = "missing; it must be given"
            case "literal_error":
                allowed = problem["ctx"]["expected"]
                names = [name.strip("' ") for name in allowed.replace(" or ", ", ").split(",")]
                what = f"found {found(problem['input'])}{nearest(str(problem['input']), names)} (allowed: {allowed})"
            case "value_error":
                what = problem["msg"].removeprefix("Value error, ")
            case _:
                what = f"found {found(problem['input'])}; {problem['msg'][0].lower()}{problem['msg'][1:]}"
        lines.append(f"{source}: {where}: {what}")
    return "\n".join(lines)


def _fields_at(schema: type[BaseModel], path: Iterable[str]) -> list[str]:
    """The fields allowed in the section at `path`."""
    for part in path:
        field = schema.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        schema = inner
    return list(schema.model_fields)


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the known name that is most like this one; empty where none is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def found(value: object) -> str:
    """A value as an error quotes it."""
    text = repr(value)
    return f"{text[:60]}..." if len(text) > 64 else text
