"""Whoever dies is started again: after pauses that grow, not for ever, and as itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from deploy.api import Api, ApiError
from deploy.home import MOST_DEATHS, Home, Record
from deploy.local import Death, LocalCluster
from deploy.supervision import Happening, RestartRule, Supervision
from deploy.supervisor import _watch, noted
from paramserver.process import StopRequest

Make = Callable[..., LocalCluster]
Poll = Callable[..., Any]

RULE = RestartRule()
KILLED = -int(signal.SIGKILL)


class FakeCluster:
    """Dies when it is told to; its clock is moved by hand."""

    def __init__(self, log: Path) -> None:
        self.now = 1000.0
        self.dead: list[Death] = []
        self.started: list[tuple[str, float]] = []
        self.refuses = False
        self._log = log

    def deaths(self) -> list[Death]:
        found, self.dead = self.dead, []
        return found

    def start_again(self, name: str) -> None:
        if self.refuses:
            raise OSError("no more processes")
        self.started.append((name, self.now))

    def die(self, name: str = "shard-1", exit_code: int = KILLED) -> None:
        self.dead.append(Death(name, exit_code, self._log))


@pytest.fixture
def cluster(tmp_path: Path) -> FakeCluster:
    log = tmp_path / "log"
    log.write_text("its last words\n")
    return FakeCluster(log)


@pytest.fixture
def supervision(cluster: FakeCluster) -> Supervision:
    return Supervision(cluster, RULE, lambda: cluster.now)


def _pause_after_death(cluster: FakeCluster, supervision: Supervision, life: float) -> float:
    """Let shard-1 live so long, die, and be started again; how long that took."""
    cluster.now += life
    cluster.die()
    died = cluster.now
    (happening,) = supervision.look()
    assert happening.outcome == "died"
    before = len(cluster.started)
    while len(cluster.started) == before:
        cluster.now += 0.025
        supervision.look()
    return cluster.started[-1][1] - died


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_steady_life(
    cluster: FakeCluster, supervision: Supervision
) -> None:
    pauses = [_pause_after_death(cluster, supervision, life=20.0) for _ in range(10)]
    expected = [min(0.1 * 2**death, 10.0) for death in range(10)]
    assert pauses == pytest.approx(expected, abs=0.05)
    assert _pause_after_death(cluster, supervision, RULE.steady_seconds - 1) == pytest.approx(10.0, abs=0.05)
    assert _pause_after_death(cluster, supervision, RULE.steady_seconds) == pytest.approx(0.1, abs=0.05)
    assert {name for name, _ in cluster.started} == {"shard-1"}


def test_the_text_says_who_died_of_what_and_that_it_runs_again(cluster: FakeCluster, supervision: Supervision) -> None:
    cluster.die("shard-1")
    cluster.die("worker-0", exit_code=1)
    assert [one.outcome for one in supervision.look()] == ["died", "died"]
    cluster.now += RULE.first_pause_seconds
    assert [(one.outcome, one.text) for one in supervision.look()] == [
        ("started again", "shard-1 was killed (SIGKILL), started again"),
        ("started again", "worker-0 ended with exit code 1, started again"),
    ]


def test_who_dies_again_and_again_at_once_is_given_up_with_its_last_words(
    cluster: FakeCluster, supervision: Supervision
) -> None:
    for _ in range(RULE.most_quick_deaths - 1):
        _pause_after_death(cluster, supervision, life=1.0)
    starts = len(cluster.started)
    cluster.now += 1.0
    cluster.die()
    (happening,) = supervision.look()
    assert happening.outcome == "given up"
    assert f"{RULE.most_quick_deaths} times in a row" in happening.text
    assert "its last words" in happening.text
    cluster.now += 1000.0
    assert supervision.look() == []
    assert len(cluster.started) == starts
    assert set(supervision.gone) == {"shard-1"}


def test_a_longer_life_between_quick_deaths_saves_a_process(cluster: FakeCluster, supervision: Supervision) -> None:
    for life in [1.0, 1.0, 1.0, 1.0, 15.0] * 4:
        _pause_after_death(cluster, supervision, life)
    assert supervision.gone == {}


def test_the_deaths_of_one_process_do_not_slow_another(cluster: FakeCluster, supervision: Supervision) -> None:
    for _ in range(4):
        _pause_after_death(cluster, supervision, life=1.0)
    cluster.die("worker-0")
    supervision.look()
    cluster.now += RULE.first_pause_seconds
    assert [happening.name for happening in supervision.look()] == ["worker-0"]


def test_who_leaves_in_good_order_stays_away(cluster: FakeCluster, supervision: Supervision) -> None:
    cluster.die("worker-0", exit_code=0)
    (happening,) = supervision.look()
    assert happening.outcome == "left"
    cluster.now += 1000.0
    assert supervision.look() == []
    assert cluster.started == []
    assert set(supervision.gone) == {"worker-0"}


def test_a_start_that_the_system_refuses_is_tried_again(cluster: FakeCluster, supervision: Supervision) -> None:
    cluster.die()
    supervision.look()
    cluster.refuses = True
    cluster.now += 1.0
    assert supervision.look() == []
    cluster.refuses = False
    cluster.now += RULE.longest_pause_seconds
    assert [happening.outcome for happening in supervision.look()] == ["started again"]


def test_the_record_of_a_death_says_what_became_of_it(cluster: FakeCluster) -> None:
    cluster.die("shard-1")
    (death,) = cluster.deaths()
    now = datetime.now(UTC)
    record = noted(Record(1, "ready"), Happening(death, "died", ""), now)
    assert [(note["name"], note["outcome"]) for note in record.deaths] == [("shard-1", "died")]
    other = noted(record, Happening(replace(death, name="worker-0"), "given up", ""), now)
    record = noted(other, Happening(death, "started again", ""), now)
    outcomes = [(note["name"], note["outcome"]) for note in record.deaths]
    assert outcomes == [("shard-1", "started again"), ("worker-0", "given up")]
    assert (record.restarts, other.restarts) == (1, 0)
    for _ in range(MOST_DEATHS):
        record = noted(record, Happening(death, "died", ""), now)
    assert len(record.deaths) == MOST_DEATHS


def test_a_record_that_finds_no_room_ends_no_cluster(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes die when a disk is full: that is no time to end the others for a note."""
    home, stop, turns = Home(tmp_path / "no folder"), StopRequest(), iter([False, False, True])
    monkeypatch.setattr(stop, "wait", lambda seconds: next(turns))
    with pytest.raises(OSError, match="No such file"):
        home.write(Record(1, "ready"))
    cluster.die()
    _watch(cluster, home, Record(1, "ready"), stop)  # type: ignore[arg-type]
    assert next(turns, None) is None


@pytest.mark.timeout(240)
def test_every_process_that_is_killed_comes_back_under_its_name(local_cluster: Make, poll: Poll) -> None:
    cluster = local_cluster(shards=1, workers=1)
    supervision = Supervision(cluster)
    with Api(cluster.url, timeout_seconds=2.0) as api:
        before = {session["name"]: session["incarnation"] for session in api.status()["sessions"]}
        pids = cluster.pids()
        for name in pids:
            os.kill(pids[name], signal.SIGKILL)

        def are_back() -> bool:
            supervision.look()
            try:
                sessions = api.status()["sessions"]
            except ApiError:
                return False
            members = {one["name"]: one["pid"] for one in sessions if one["incarnation"] > before[one["name"]]}
            return members == {name: pid for name, pid in cluster.pids().items() if name != "coordinator"} != {}

        poll("shard and worker to join as their own successors", are_back, 120, 0.1)
    assert set(before.values()) == {1}
    assert not set(cluster.pids().values()) & set(pids.values())
    assert supervision.gone == {}


@pytest.mark.timeout(120)
def test_a_process_that_cannot_start_is_given_up_and_the_others_go_on(local_cluster: Make, poll: Poll) -> None:
    cluster = local_cluster(shards=1, workers=1)
    supervision = Supervision(cluster, RestartRule(first_pause_seconds=0.01, most_quick_deaths=3))
    # Its name stays, its way to the coordinator is gone: it ends by itself each time it is started.
    control, cluster.control = cluster.control, "tcp://no address"
    os.kill(cluster.pids()["shard-0"], signal.SIGKILL)
    found: list[Happening] = []

    def is_given_up() -> bool:
        found.extend(supervision.look())
        return bool(supervision.gone)

    poll("the shard to be given up", is_given_up, 60, 0.1)
    cluster.control = control
    assert [one.outcome for one in found] == ["died", "started again", "died", "started again", "given up"]
    assert "tcp://no address" in found[-1].text
    assert set(cluster.pids()) == {"coordinator", "worker-0"}
