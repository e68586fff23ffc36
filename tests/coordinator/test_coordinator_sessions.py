"""Sessions: names, incarnations and their end."""

from __future__ import annotations

from paramserver.coordinator.sessions import Sessions
from paramserver.protocol.messages import Heartbeat, Refusal, Register, Registered, WorkerReport


def register(sessions: Sessions, now: float = 0.0, peer: bytes = b"p", **fields: object) -> Registered | Refusal:
    known: dict[str, object] = {"role": "worker", "name": "w", "pid": 7, "host": "here"}
    return sessions.register(peer, Register(**{**known, **fields}), now)  # type: ignore[arg-type]


def beat(sessions: Sessions, incarnation: int, now: float, peer: bytes = b"p", seen: int = 0) -> bool:
    message = Heartbeat(name="w", incarnation=incarnation, seen=seen, report=WorkerReport())
    return sessions.hear(peer, message, now) is not None


def incarnation_of(answer: Registered | Refusal) -> int:
    assert isinstance(answer, Registered), answer
    return answer.incarnation


def code_of(answer: Registered | Refusal) -> str:
    assert isinstance(answer, Refusal), answer
    return answer.code


def test_incarnation_grows_with_every_process_of_a_name_and_across_restarts() -> None:
    sessions = Sessions({"w": 4})
    assert incarnation_of(register(sessions)) == 5
    sessions.expire(10.0)
    assert incarnation_of(register(sessions, now=10.0, pid=8)) == 6


def test_live_name_is_refused_to_another_process() -> None:
    sessions = Sessions({})
    register(sessions)
    assert code_of(register(sessions, peer=b"q", pid=8)) == "name-taken"
    assert code_of(register(sessions, peer=b"q", pid=7, host="there")) == "name-taken"
    assert code_of(register(sessions, peer=b"p", role="shard", address="tcp://x:1")) == "name-taken"


def test_repeated_registration_of_one_process_keeps_its_incarnation() -> None:
    sessions = Sessions({})
    first = incarnation_of(register(sessions))
    assert incarnation_of(register(sessions)) == first
    assert incarnation_of(register(sessions, peer=b"reconnected")) == first
    assert incarnation_of(register(sessions, peer=b"again", incarnation=first)) == first


def test_process_unknown_after_a_restart_keeps_its_incarnation() -> None:
    sessions = Sessions({"w": 3})
    assert incarnation_of(register(sessions, incarnation=3)) == 3


def test_predecessor_does_not_come_back_after_its_successor() -> None:
    sessions = Sessions({"w": 3})
    assert code_of(register(sessions, incarnation=2)) == "name-taken"


def test_wrong_version_and_shard_without_address_are_refused() -> None:
    assert code_of(register(Sessions({}), version=99)) == "wrong-version"
    assert code_of(register(Sessions({}), role="shard")) == "malformed"


def test_heartbeats_keep_a_session_and_silence_ends_it() -> None:
    sessions = Sessions({})
    number = incarnation_of(register(sessions))
    assert beat(sessions, number, 2.9)
    assert not sessions.expire(5.8)
    assert [session.name for session in sessions.expire(6.0)] == ["w"]
    assert not beat(sessions, number, 6.0)


def test_heartbeat_of_another_incarnation_is_unknown() -> None:
    sessions = Sessions({})
    number = incarnation_of(register(sessions))
    assert not beat(sessions, number + 1, 0.0)


def test_own_absence_extends_sessions() -> None:
    sessions = Sessions({})
    register(sessions)
    sessions.extend(60.0)
    assert not sessions.expire(62.0)
    assert sessions.expire(63.1)


def test_reconnected_process_is_answered_at_its_new_connection() -> None:
    sessions = Sessions({})
    number = incarnation_of(register(sessions))
    assert beat(sessions, number, 0.1, peer=b"new")
    session = sessions.get("w")
    assert session is not None
    assert session.peer == b"new"


def test_no_heartbeat_moves_the_numbers_of_orders() -> None:
    """The largest one would be followed by a number that no message can carry: no order would arrive any more."""
    sessions = Sessions({})
    incarnation = incarnation_of(register(sessions))
    assert beat(sessions, incarnation, now=1.0, seen=2**62 - 1)
    session = sessions.get("w")
    assert session is not None
    assert session.number == 0
