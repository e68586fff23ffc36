"""A schedule is a function of its seed and declaration, and its mix is the one that was declared."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.chaos.schedule import (
    OTHERS,
    SECONDS,
    STALLING,
    Declaration,
    ScheduleError,
    count_kinds,
    make_schedule,
)

USUAL = Declaration(seed=7, seconds=600.0, shards=3, workers=4, faults=60, stalls=12)

declarations = st.builds(
    Declaration,
    seed=st.integers(0, 2**32),
    seconds=st.floats(5.0, 10_000.0),
    shards=st.integers(1, 5),
    workers=st.integers(1, 6),
    faults=st.integers(20, 80),
    stalls=st.integers(0, 20),
    has_backups=st.booleans(),
)


def test_the_same_seed_gives_the_same_schedule_and_another_one_another() -> None:
    assert make_schedule(USUAL) == make_schedule(replace(USUAL))
    assert make_schedule(USUAL) != make_schedule(replace(USUAL, seed=8))
    # Pinned: a seed that has found something must find it again with a later release.
    first, last = make_schedule(USUAL)[0], make_schedule(USUAL)[-1]
    assert (first.at_seconds, str(first)) == (21.54, "cut-shard-coordinator shard-1 | coordinator for 1.4 s")
    assert (last.at_seconds, str(last)) == (553.47, "stop-shard shard-0 for 1.9 s")


@given(declarations)
def test_faults_are_as_many_as_declared_in_order_and_within_the_time(declaration: Declaration) -> None:
    planned = make_schedule(declaration)
    assert len(planned) == declaration.faults
    assert count_kinds(planned) == declaration.mix()
    assert sum(fault.kind in STALLING for fault in planned) == declaration.stalls
    times = [fault.at_seconds for fault in planned]
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < declaration.seconds
    assert [fault.number for fault in planned] == list(range(len(planned)))


@given(declarations)
def test_every_fault_has_ends_of_the_right_roles_and_lasts_as_its_kind_may(declaration: Declaration) -> None:
    for fault in make_schedule(declaration):
        ends = [name for name in (fault.target, fault.other) if name]
        roles = [name.split("-")[0] for name in ends]
        assert roles == (["shard"] if fault.kind == "full-disk" else fault.kind.split("-")[1:])
        assert len(set(ends)) == len(ends)
        shortest, longest = SECONDS.get(fault.kind, (0.0, 0.0))
        assert shortest - 0.01 <= fault.seconds <= longest + 0.01
        assert fault.kind.startswith("cut-") or not fault.is_silent


@given(declarations)
def test_shards_are_cut_from_each_other_only_where_they_talk(declaration: Declaration) -> None:
    kinds = count_kinds(make_schedule(declaration))
    if not declaration.has_backups or declaration.shards == 1:
        assert "cut-shard-shard" not in kinds


def test_the_mix_of_the_usual_declaration_has_every_kind() -> None:
    mix = USUAL.mix()
    assert set(mix) == (set(STALLING) | set(OTHERS)) - {"cut-shard-shard"}
    assert mix["kill-shard"] == 5
    assert mix["kill-worker"] == 10
    assert "cut-shard-shard" in replace(USUAL, has_backups=True).mix()


def test_members_of_a_role_are_hit_in_turn() -> None:
    hit = [fault.target for fault in make_schedule(USUAL) if fault.kind == "kill-worker"]
    assert set(hit[:4]) == set(hit[4:8]) == {f"worker-{number}" for number in range(4)}


def test_half_of_the_cuts_are_silent() -> None:
    cuts = [fault.is_silent for seed in range(20) for fault in make_schedule(replace(USUAL, seed=seed)) if fault.other]
    assert 0.4 < sum(cuts) / len(cuts) < 0.6


@pytest.mark.parametrize(
    ("change", "text"), [({"faults": 0}, "faults"), ({"stalls": 61}, "stalls"), ({"workers": 0}, "workers")]
)
def test_what_cannot_be_scheduled_is_refused(change: dict[str, int], text: str) -> None:
    with pytest.raises(ScheduleError, match=text):
        replace(USUAL, **change)
