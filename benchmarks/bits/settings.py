"""What is compared: how updates go out, how values come in, where the optimiser runs, and whether losses are kept.

Written PUSH/PULL with what differs from the usual behind it: "int4/ternary", "sign/ternary+worker",
"int4/ternary+forgetful", "fp32/{encoding: fp32, fresh: false}".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.bits.tasks import TASKS
from paramserver.cli.bench.choices import Ways, parse_pair
from paramserver.cli.errors import InputError
from paramserver.job import Job, JobError, parse_job

WORKER, FORGETFUL = "worker", "forgetful"


@dataclass(frozen=True)
class Setting:
    """One way to share."""

    text: str  # as it was given
    ways: Ways
    where: str = "server"  # the optimiser
    is_forgetful: bool = False  # what rounding loses is lost, both ways

    @property
    def label(self) -> str:
        others = [word for word, is_so in ((WORKER, self.where == WORKER), (FORGETFUL, self.is_forgetful)) if is_so]
        return ", ".join([self.ways.label, *others])


def parse_setting(text: str) -> Setting:
    """Raises InputError."""
    pair, *others = text.split("+")
    unknown = sorted(set(others) - {WORKER, FORGETFUL})
    if unknown:
        raise InputError(f"found {unknown[0]!r} in {text!r}; behind PUSH/PULL may stand +{WORKER} and +{FORGETFUL}")
    where = WORKER if WORKER in others else "server"
    return Setting(text, parse_pair(pair, "SETTING"), where, FORGETFUL in others)


FRESH = "fp32/fp32"
SAME_PERIOD = "fp32/{encoding: fp32, fresh: false}"


def references(where: str, workers: int) -> tuple[str, str]:
    """Full precision with fresh weights, and at the period at which deltas are published.

    Up to two workers every push is published: both are the same.
    """
    suffix = f"+{WORKER}" if where == WORKER else ""
    return FRESH + suffix, (SAME_PERIOD if workers > 2 else FRESH) + suffix


def with_references(settings: Sequence[Setting], workers: int) -> list[Setting]:
    """The settings, each once, behind what they are compared with."""
    wanted = {text: parse_setting(text) for one in settings for text in references(one.where, workers)}
    return list((wanted | {one.text: one for one in settings}).values())


@dataclass(frozen=True)
class Cell:
    """One setting, on one task, with so many workers, from one seed."""

    task: str
    setting: Setting
    workers: int
    seed: int
    steps: int  # of all workers together
    warm_up: int

    @property
    def key(self) -> tuple[str, str, int, int, int, int]:
        return self.task, self.setting.text, self.workers, self.seed, self.steps, self.warm_up

    def job(self) -> Job:
        """Raises InputError for what no job may say."""
        return parse(self.content())

    def content(self) -> dict[str, Any]:
        content = TASKS[self.task].job(f"bits-{self.task}", self.seed, self.workers)
        content["push"], content["pull"] = dict(self.setting.ways.push), dict(self.setting.ways.pull)
        content["optimizer"]["where"] = self.setting.where
        return content


def parse(content: dict[str, Any]) -> Job:
    try:
        return parse_job(content, "bits")
    except JobError as error:
        raise InputError(str(error)) from None
