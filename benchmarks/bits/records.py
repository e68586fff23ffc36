"""Results as JSON lines, one a cell: written as they come, so that a sweep which was interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.bits.settings import Cell, Setting, parse_setting
from benchmarks.bits.simulation import Outcome
from paramserver.cli.errors import InputError

Key = tuple[str, str, int, int, int, int]


@dataclass(frozen=True)
class Record:
    """A cell and what it reached."""

    cell: Cell
    outcome: Outcome

    def line(self) -> str:
        cell = {name: value for name, value in vars(self.cell).items() if name != "setting"}
        return json.dumps({"setting": self.cell.setting.text, **cell, "outcome": asdict(self.outcome)})


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Those of all files. Raises InputError for a file that is none of ours."""
    found: list[Record] = []
    for path in paths:
        try:
            found += [_record(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not readable as results of this benchmark: {error}") from None
    return found


def _record(facts: dict[str, Any]) -> Record:
    found = facts.pop("outcome")
    outcome = Outcome(**(found | {"curve": tuple(found["curve"])}))
    setting: Setting = parse_setting(facts.pop("setting"))
    return Record(Cell(setting=setting, **facts), outcome)
