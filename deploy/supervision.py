"""What becomes of a process of the cluster that dies: it is started again, after a pause that grows, or given up.

A process that leaves in good order (exit code 0) was asked to, by whoever sent it SIGTERM, and stays away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from deploy.local import Death
from paramserver.process import log

LOOK_SECONDS = 0.1  # between two looks at the processes: what a death costs beside its pause

Outcome = Literal["died", "started again", "given up", "left"]


@dataclass(frozen=True)
class RestartRule:
    """When a process that died is started again, and when no more. All in seconds."""

    first_pause_seconds: float = 0.1
    longest_pause_seconds: float = 10.0
    steady_seconds: float = 60.0  # of life; then the pauses begin anew
    quick_seconds: float = 10.0  # of life; who dies sooner did not get far
    most_quick_deaths: int = 6  # in a row; then it is given up


class Supervised(Protocol):
    """The part of a cluster that is needed here."""

    def deaths(self) -> list[Death]: ...

    def start_again(self, name: str) -> None: ...


@dataclass(frozen=True)
class Happening:
    """What a look has found or done."""

    death: Death
    outcome: Outcome
    text: str  # for people

    @property
    def name(self) -> str:
        return self.death.name


@dataclass
class _Life:
    """The present life of one process, and what went before it."""

    began_at: float
    deaths: int = 0  # since its last steady life
    quick_deaths: int = 0  # in a row


class Supervision:
    """Used by the thread that has the cluster. Call `look` every LOOK_SECONDS.

    Args:
        cluster: started.
        clock: seconds, monotonic.
    """

    def __init__(
        self, cluster: Supervised, rule: RestartRule | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster = cluster
        self._rule = rule or RestartRule()
        self._clock = clock
        self._began_at = clock()
        self._lives: dict[str, _Life] = {}
        self._waiting: dict[str, tuple[float, Death]] = {}  # by name: when it is due, and what it died of
        self.gone: dict[str, Death] = {}
        """Those that are not started again, by name, with their last death."""

    def look(self) -> list[Happening]:
        """Take in who died, start again who is due, and tell both in their order."""
        now = self._clock()
        happenings = [self._judge(death, now) for death in self._cluster.deaths()]
        for name, (due_at, death) in list(self._waiting.items()):
            if now >= due_at:
                happenings += self._start(name, death, now)
        return happenings

    def _judge(self, death: Death, now: float) -> Happening:
        rule, life = self._rule, self._lives.setdefault(death.name, _Life(self._began_at))
        if death.is_in_order:
            self.gone[death.name] = death
            return Happening(death, "left", f"{death.phrase} and is not started again")
        age = now - life.began_at
        if age >= rule.steady_seconds:
            life.deaths = 0
        life.quick_deaths = life.quick_deaths + 1 if age < rule.quick_seconds else 0
        life.deaths += 1
        if life.quick_deaths >= rule.most_quick_deaths:
            self.gone[death.name] = death
            log("child-given-up", level="error", child=death.name, deaths=life.quick_deaths, reason=death.reason)
            return Happening(
                death,
                "given up",
                f"{death.name} died {life.quick_deaths} times in a row within {rule.quick_seconds:.0f} s of its start "
                f"and is not started again: {death}",
            )
        pause = min(rule.first_pause_seconds * 2 ** min(life.deaths - 1, 32), rule.longest_pause_seconds)
        self._waiting[death.name] = now + pause, death
        return Happening(death, "died", f"{death.phrase}, starting it again in {pause:.1f} s")

    def _start(self, name: str, death: Death, now: float) -> list[Happening]:
        try:
            self._cluster.start_again(name)
        except OSError as error:  # no memory or no room for one more process: that may pass
            pause = self._rule.longest_pause_seconds
            log("child-not-started", level="error", child=name, reason=error, again_in_seconds=pause)
            self._waiting[name] = now + pause, death
            return []
        del self._waiting[name]
        self._lives[name].began_at = now
        log("child-started-again", level="warning", child=name, after=death.reason, deaths=self._lives[name].deaths)
        return [Happening(death, "started again", f"{death.phrase}, started again")]
