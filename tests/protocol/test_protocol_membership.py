"""The process's side of membership, with an injected clock."""

from __future__ import annotations

import pytest

from paramserver.protocol.membership import UNANSWERED_BEATS, Membership, MembershipError
from paramserver.protocol.messages import Heartbeat, Orders, Refusal, Register, Registered, ShardReport

REGISTERED = Registered(incarnation=4, heartbeat_seconds=0.5, session_seconds=3.0)


def member() -> Membership:
    return Membership(Register(role="shard", name="shard-0"), ShardReport)


def test_registers_until_answered_then_beats() -> None:
    membership = member()
    assert isinstance(membership.due(0.0), Register)
    assert membership.due(0.5) is None
    assert isinstance(membership.due(1.0), Register)
    membership.hear(REGISTERED, 1.1)
    beat = membership.due(1.1)
    assert isinstance(beat, Heartbeat)
    assert beat.incarnation == 4
    assert membership.due(1.2) is None
    assert isinstance(membership.due(1.6), Heartbeat)


def test_orders_that_were_overtaken_are_not_obeyed() -> None:
    membership = member()
    membership.hear(REGISTERED, 0.0)
    assert membership.hear(Orders(number=2), 0.0) is not None
    assert membership.hear(Orders(number=1), 0.0) is None
    assert membership.hear(Orders(number=2), 0.0) is None
    beat = membership.due(0.0)
    assert isinstance(beat, Heartbeat)
    assert beat.seen == 2


def test_forgotten_session_registers_again_with_its_incarnation() -> None:
    membership = member()
    membership.hear(REGISTERED, 0.0)
    membership.hear(Refusal(code="unknown-session", detail=""), 1.0)
    again = membership.due(1.0)
    assert isinstance(again, Register)
    assert again.incarnation == 4


def test_silence_resets_the_connection_once_and_keeps_trying() -> None:
    membership = member()
    membership.hear(REGISTERED, 0.0)
    for beat in range(UNANSWERED_BEATS):
        assert isinstance(membership.due(float(beat)), Heartbeat)
    assert not membership.must_reset
    assert isinstance(membership.due(100.0), Register)
    assert membership.must_reset


def test_taken_name_is_an_error_only_after_a_dead_namesake_would_be_gone() -> None:
    membership = member()
    refusal = Refusal(code="name-taken", detail="pid 7")
    membership.hear(refusal, 0.0)
    membership.hear(refusal, 5.0)
    with pytest.raises(MembershipError, match="pid 7.*--name"):
        membership.hear(refusal, 7.0)


def test_another_protocol_version_is_an_error_at_once() -> None:
    with pytest.raises(MembershipError, match="version"):
        member().hear(Refusal(code="wrong-version", detail="1 or 2"), 0.0)
