"""Checking a submitted job before it is queued: the specification, and that its paths stay inside the data roots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from paramserver.job import Job, JobError, lease_examples_of, parse_job_text

SOURCE = "submitted job"
MAX_LEASE_EXAMPLES = 2**20
MAX_DEPTH = 32


def check_submission(text: str, data_roots: Sequence[Path]) -> Job:
    """The job of a YAML or JSON text, with the paths in it absolute. Raises JobError."""
    job = _parse(text)
    examples = lease_examples_of(job)
    if not isinstance(examples, int) or not 1 <= examples <= MAX_LEASE_EXAMPLES:
        raise JobError(
            f"{SOURCE}: data: found {examples!r} examples a lease; allowed are 1 to {MAX_LEASE_EXAMPLES}; "
            "change data.batch"
        )
    roots = [root.resolve() for root in data_roots]
    model = job.model.model_copy(update={"args": _inside("model.args", job.model.args, roots)})
    return job.model_copy(update={"model": model, "data": _inside("data", job.data, roots)})


def _parse(text: str) -> Job:
    try:
        _check_shape(text)
    except yaml.YAMLError:
        pass  # parse_job_text explains it
    try:
        return parse_job_text(text, SOURCE)
    except JobError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise JobError(f"{SOURCE}: not readable as YAML: {' '.join(str(error).split())[:500]}") from None


def _check_shape(text: str) -> None:
    """Refuse short texts that stand for endless ones, or take for ever to read."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise JobError(f"{SOURCE}: YAML aliases (*name) are not allowed; write the values out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise JobError(f"{SOURCE}: nested more than {MAX_DEPTH} deep, the most allowed")


def _inside(field: str, value: Any, roots: Sequence[Path]) -> Any:
    """`value` with every path in it resolved. Paths are the texts under a key `path` or `..._path`."""
    if isinstance(value, dict):
        return {
            key: _resolve(f"{field}.{key}", part, roots)
            if isinstance(part, str) and (key == "path" or key.endswith("_path"))
            else _inside(f"{field}.{key}", part, roots)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [_inside(f"{field}.{index}", part, roots) for index, part in enumerate(value)]
    return value


def _resolve(field: str, path: str, roots: Sequence[Path]) -> str:
    if not roots:
        raise JobError(
            f"{SOURCE}: {field}: found {path!r}, but this cluster has no data roots, so that no path is allowed; "
            "start the coordinator with --data-root FOLDER, or use a data set by name"
        )
    try:
        # Links are followed before the comparison: a link inside a root may not lead out of it.
        candidates = [((root / path).resolve(), root) for root in roots]
        allowed = [candidate for candidate, root in candidates if candidate == root or root in candidate.parents]
        existing = [candidate for candidate in allowed if candidate.exists()]
    except (OSError, RuntimeError, ValueError) as error:
        raise JobError(f"{SOURCE}: {field}: found {path[:200]!r}, which is no usable path: {error}") from None
    if not allowed:
        raise JobError(
            f"{SOURCE}: {field}: found {path!r}, which is outside the data roots "
            f"({', '.join(map(str, roots))}); move the data there, or add a --data-root"
        )
    return str((existing or allowed)[0])
