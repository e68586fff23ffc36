"""What a user may choose of a measurement, from text: sizes, and how each way is encoded. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paramserver.cli.errors import InputError

if TYPE_CHECKING:
    from paramserver.job import Job

_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[kM]?)")
_UNITS = {"": 1, "k": 1000, "M": 1_000_000}
MOST_ELEMENTS = 1_000_000_000


def parse_sizes(text: str, option: str, least: int = 1) -> list[int]:
    """Whole numbers from "100k,1M". Raises InputError."""
    return [_size(part.strip(), option, least) for part in text.split(",")]


def _size(text: str, option: str, least: int) -> int:
    match = _SIZE.fullmatch(text)
    value = float(match["number"]) * _UNITS[match["unit"]] if match else -1.0
    if value != int(value) or not least <= value <= MOST_ELEMENTS:
        raise InputError(
            f"{option}: found {text!r}; sizes are whole numbers from {least} to {MOST_ELEMENTS}, with k or M for "
            "thousands or millions and a comma between two, for example 100k,1M"
        )
    return int(value)


def short_size(elements: int) -> str:
    """ "100k", "1M", "2.5M"; a number that is none of these as it is."""
    for unit, factor in (("M", 1_000_000), ("k", 1000)):
        if elements >= factor and elements * 10 % factor == 0:
            return f"{elements / factor:g}{unit}"
    return str(elements)


@dataclass(frozen=True)
class Ways:
    """How updates go out and values come in: the `push` and `pull` sections of a job."""

    push: Mapping[str, Any]
    pull: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{_label(self.push)} / {_label(self.pull)}"


def parse_ways(push: str, pull: str, push_option: str = "--push", pull_option: str = "--pull") -> Ways:
    """The two ways, each an encoding's name or the section as YAML, such as "{encoding: int4, tile: 2048}"."""
    return Ways(_section(push, push_option), _section(pull, pull_option))


def parse_pair(text: str, option: str) -> Ways:
    """Both ways from one text, "int8/bf16"."""
    push, slash, pull = text.partition("/")
    if not slash:
        raise InputError(f"{option}: found {text!r}; a pair is PUSH/PULL, for example int8/bf16")
    return parse_ways(push, pull, option, option)


def _section(text: str, option: str) -> Mapping[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{option}: {text!r} is not readable as YAML: {' '.join(str(error).split())}") from None
    section = {"encoding": found} if isinstance(found, str) else found
    if not isinstance(section, dict) or not isinstance(section.get("encoding"), str):
        raise InputError(
            f"{option}: found {text!r}; give an encoding's name, or a job's section, "
            "for example int8 or '{encoding: int8, tile: 2048}'"
        )
    return section


def _label(section: Mapping[str, Any]) -> str:
    others = [f"{name} {value}" for name, value in section.items() if name != "encoding"]
    return str(section["encoding"]) + (f" ({', '.join(others)})" if others else "")


def synthetic_job(ways: Ways, optimizer: Mapping[str, Any], log: str = "none") -> Job:
    """The specification that shards of a measurement serve; its model is not built. Raises InputError."""
    from paramserver.job import JobError, parse_job

    content = {
        "name": "bench",
        "model": {"family": "recurrent", "args": {"task": "char-lm"}},
        "push": dict(ways.push),
        "pull": dict(ways.pull),
        "optimizer": dict(optimizer),
        "durability": {"log": log},
    }
    try:
        return parse_job(content, "bench")
    except JobError as error:
        raise InputError(str(error)) from None
