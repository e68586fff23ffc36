"""The shard's core, driven message by message."""

from __future__ import annotations

import json

import numpy as np
import pytest

from paramserver.encoding import make_encoding
from paramserver.protocol.layout import Layout, Parameter, cut_layout
from paramserver.protocol.messages import (
    BlockUpdate,
    Held,
    Hello,
    Initialise,
    Initialised,
    Member,
    Message,
    PartOrder,
    Pull,
    Pulled,
    Push,
    Pushed,
    Refusal,
    Tick,
    Want,
    Welcome,
)
from paramserver.shard.core import Reply, ShardCore

LAYOUT: Layout = cut_layout([Parameter("a", (8, 16), "first"), Parameter("b", (40,), "second")])
SPECIFICATION: dict[str, object] = {
    "name": "job",
    "model": {"family": "recurrent"},
    "optimizer": {"name": "sgd", "lr": 1.0},
    "push": {"encoding": "fp32"},
    "pull": {"encoding": "fp32"},
}


def order(term: int = 1, members: tuple[str, ...] = (), **settings: object) -> PartOrder:
    return PartOrder(
        part="shard-0",
        job="job",
        specification=json.dumps({**SPECIFICATION, **settings}),
        term=term,
        phase=0,
        layout=LAYOUT,
        blocks=tuple(range(len(LAYOUT.blocks))),
        members=tuple(Member(name, 1) for name in members),
    )


class Driver:
    """A shard with one job whose weights begin at zero, and workers that speak to it."""

    def __init__(self, **settings: object) -> None:
        self.core = ShardCore("shard-0")
        self.core.take_order(order(**settings))  # type: ignore[arg-type]
        frames = [memoryview(bytes(4 * block.elements)) for block in LAYOUT.blocks]
        reply = self.one(
            "w0", Initialise(request=1, job="job", term=1, layout=LAYOUT.fingerprint, blocks=(0, 1)), frames
        )
        assert isinstance(reply, Initialised)
        for worker in ("w0", "w1"):
            assert isinstance(self.hello(worker), Welcome)

    def send(self, worker: str, message: Message, frames: list[memoryview] | None = None) -> list[Reply]:
        return self.core.handle(worker.encode(), message, frames or [])

    def one(self, worker: str, message: Message, frames: list[memoryview] | None = None) -> Message:
        replies = self.send(worker, message, frames)
        assert len(replies) == 1
        return replies[0].message

    def hello(self, worker: str, incarnation: int = 1, **changes: object) -> Message:
        fields = {
            "worker": worker,
            "incarnation": incarnation,
            "job": "job",
            "layout": LAYOUT.fingerprint,
            "part": "shard-0",
        }
        return self.one(worker, Hello(**{**fields, **changes}))  # type: ignore[arg-type]

    def push(self, worker: str, sequence: int, value: float = 1.0, **changes: object) -> list[Reply]:
        """Push `value` to every element of block 0."""
        encoding = make_encoding(str(changes.pop("encoding", "fp32")))
        elements = LAYOUT.blocks[0].elements
        frame = np.empty(encoding.frame_bytes(elements), np.uint8)
        encoding.encode(np.full(elements, value, np.float32), frame)
        update = BlockUpdate(0, sequence, int(str(changes.pop("edition", 0))), encoding.identifier)
        fields = {
            "request": 7, "job": "job", "term": 1, "worker": worker, "incarnation": 1, "step": sequence,
            "updates": (update,),
        }  # fmt: skip
        frames = changes.pop("frames", [memoryview(frame.tobytes())])
        return self.send(worker, Push(**{**fields, **changes}), frames)  # type: ignore[arg-type]

    def pull(self, worker: str, step: int = 0, have: int = -1, **changes: object) -> list[Reply]:
        fields = {
            "request": 9, "job": "job", "term": 1, "worker": worker, "incarnation": 1, "step": step,
            "wants": (Want(0, have),),
        }  # fmt: skip
        return self.send(worker, Pull(**{**fields, **changes}))  # type: ignore[arg-type]

    @property
    def weight(self) -> float:
        assert self.core.serving is not None
        weights = self.core.serving.blocks[0].weights
        assert (weights == weights[0]).all()
        return float(weights[0])

    def state(self) -> tuple[float, int, int]:
        assert self.core.serving is not None
        block = self.core.serving.blocks[0]
        return self.weight, block.version, self.core.serving.telemetry.updates


def refusal(replies: list[Reply]) -> str:
    """The name of the one refusal among the replies."""
    (reply,) = replies
    if isinstance(reply.message, Pushed):
        (refused,) = reply.message.refused
        return refused.code
    assert isinstance(reply.message, Refusal)
    return reply.message.code


def test_a_push_moves_the_weights_by_the_learning_rate() -> None:
    driver = Driver()
    (reply,) = driver.push("w0", 1, 0.25)
    assert isinstance(reply.message, Pushed)
    assert reply.message.acknowledged[0].version == 1
    assert driver.weight == -0.25


def test_duplicate_push_is_applied_once() -> None:
    driver = Driver()
    driver.push("w0", 1)
    (reply,) = driver.push("w0", 1)
    assert isinstance(reply.message, Pushed)
    assert reply.message.acknowledged[0].duplicate
    assert driver.state() == (-1.0, 1, 1)
    assert driver.core.serving is not None
    assert driver.core.serving.telemetry.duplicates == 1


def test_gap_in_the_sequence_is_refused_with_the_expected_number() -> None:
    driver = Driver()
    driver.push("w0", 1)
    (reply,) = driver.push("w0", 3)
    assert isinstance(reply.message, Pushed)
    assert (reply.message.refused[0].code, reply.message.refused[0].expected) == ("out-of-order", 2)
    assert driver.state() == (-1.0, 1, 1)


def test_sequences_of_two_workers_are_independent() -> None:
    driver = Driver()
    driver.push("w0", 1)
    driver.push("w1", 1)
    assert driver.state() == (-2.0, 2, 2)


def test_new_incarnation_starts_again_and_shuts_the_old_one_out() -> None:
    driver = Driver()
    driver.push("w0", 1)
    assert isinstance(driver.hello("w0", incarnation=2), Welcome)
    driver.push("w0", 1, incarnation=2)
    assert driver.state() == (-2.0, 2, 2)
    assert refusal([Reply(b"w0", driver.hello("w0", incarnation=1))]) == "old-incarnation"


def test_staleness_counts_versions_since_the_edition_computed_on() -> None:
    driver = Driver()
    for sequence in (1, 2, 3):
        driver.push("w0", sequence, edition=sequence - 1)
    driver.push("w1", 1, edition=0)
    assert driver.core.serving is not None
    rows = driver.core.serving.telemetry.staleness_rows()
    assert [(row.worker, row.group, row.counts, row.total) for row in rows] == [
        ("w0", "first", (3,), 0),
        ("w1", "first", (0, 0, 0, 1), 3),
    ]


@pytest.mark.parametrize(
    ("usual", "pushed", "is_taken"),
    [("int4", "int8", True), ("sign", "int8", True), ("int8", "int4", False), ("fp32", "int8", False)],
)
def test_a_shard_takes_what_the_first_updates_are_pushed_in(usual: str, pushed: str, is_taken: bool) -> None:
    driver = Driver(push={"encoding": usual})
    replies = driver.push("w0", 1, encoding=pushed)
    if is_taken:
        assert driver.weight == pytest.approx(-1.0, rel=1e-3)
    else:
        assert refusal(replies) == "unknown-encoding"


@pytest.mark.parametrize(("damping", "moved"), [("none", 1.0), ("inverse", 0.25), ("sqrt", 0.5)])
def test_damping_scales_the_learning_rate_by_staleness(damping: str, moved: float) -> None:
    driver = Driver(consistency={"mode": "async", "damping": damping})
    for sequence in (1, 2, 3):
        driver.push("w0", sequence, 0.0, edition=sequence - 1)
    driver.push("w1", 1, 1.0, edition=0)
    assert driver.weight == -moved


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"job": "other"}, "wrong-job"),
        ({"term": 0}, "wrong-term"),
        ({"term": 2}, "wrong-term"),
        ({"incarnation": 3}, "unknown-worker"),
        ({"edition": 5}, "unknown-edition"),
        ({"encoding": "int8"}, "unknown-encoding"),
        ({"updates": (BlockUpdate(17, 1, 0, "fp32"),)}, "unknown-block"),
        ({"updates": (BlockUpdate(1, 1, 0, "fp32"),)}, "wrong-size"),
        ({"frames": [memoryview(b"")]}, "wrong-size"),
        ({"frames": [memoryview(bytes(512 - 4))]}, "wrong-size"),
        ({"value": float("nan"), "frames": [memoryview(np.full(128, np.nan, np.float32).tobytes())]}, "not-finite"),
        ({"frames": [memoryview(np.full(128, np.inf, np.float32).tobytes())]}, "not-finite"),
    ],
)
def test_bad_push_gets_a_named_refusal_and_changes_nothing(changes: dict[str, object], code: str) -> None:
    driver = Driver()
    changes.pop("value", None)
    before = driver.state()
    assert refusal(driver.push("w0", 1, **changes)) == code
    assert driver.state() == before
    assert driver.core.refusals == {code: 1}
    driver.push("w0", 1)  # the refused sequence was not used up
    assert driver.state() == (-1.0, 1, 1)


def test_one_bad_update_does_not_spoil_its_neighbours() -> None:
    driver = Driver()
    updates = (BlockUpdate(1, 5, 0, "fp32"), BlockUpdate(0, 1, 0, "fp32"))
    frames = [memoryview(bytes(160)), memoryview(np.ones(128, np.float32).tobytes())]
    (reply,) = driver.push("w0", 1, updates=updates, frames=frames)
    assert isinstance(reply.message, Pushed)
    assert [refused.code for refused in reply.message.refused] == ["out-of-order"]
    assert driver.weight == -1.0


def test_pull_whose_answer_fits_no_message_is_refused() -> None:
    driver = Driver()
    replies = driver.pull("w0", wants=tuple(Want(0) for _ in range(20_000)))
    assert refusal(replies) == "malformed"


def test_push_whose_wants_are_refused_changes_nothing() -> None:
    driver = Driver()
    assert refusal(driver.push("w0", 1, wants=(Want(17),))) == "unknown-block"
    assert driver.state() == (0.0, 0, 0)


def test_push_with_wants_is_answered_with_the_value_that_holds_it() -> None:
    driver = Driver()
    (pushed,) = driver.push("w0", 1, wants=(Want(0, 0), Want(1, 0)))
    assert isinstance(pushed.message, Pushed)
    first, second = pushed.message.values
    assert (first.kind, first.edition, second.kind) == ("snapshot", 1, "current")
    assert (np.frombuffer(pushed.frames[0], np.float32) == -1.0).all()


def test_snapshot_does_not_change_when_a_later_update_arrives() -> None:
    driver = Driver()
    (pulled,) = driver.pull("w1")
    driver.push("w0", 1)
    assert (np.frombuffer(pulled.frames[0], np.float32) == 0.0).all()


def test_nobody_may_push_or_pull_without_hello() -> None:
    driver = Driver()
    assert refusal(driver.push("stranger", 1)) == "unknown-worker"
    assert refusal(driver.pull("stranger")) == "unknown-worker"


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"version": 99}, "wrong-version"), ({"layout": "feed"}, "wrong-layout"), ({"job": "other"}, "wrong-job")],
)
def test_hello_is_refused_by_name(changes: dict[str, object], code: str) -> None:
    assert refusal([Reply(b"", Driver().hello("w2", **changes))]) == code  # type: ignore[arg-type]


def test_initialise_is_idempotent_and_refuses_other_values() -> None:
    driver = Driver()
    driver.push("w0", 1)
    message = Initialise(request=2, job="job", term=1, layout=LAYOUT.fingerprint, blocks=(0,))
    assert isinstance(driver.one("w1", message, [memoryview(bytes(512))]), Initialised)
    assert driver.weight == -1.0, "a repeated initialise must not undo training"
    other = memoryview(np.ones(128, np.float32).tobytes())
    assert refusal(driver.send("w1", message, [other])) == "already-initialised"


def test_a_block_without_a_value_is_neither_pushed_nor_pulled() -> None:
    core = ShardCore("shard-0")
    core.take_order(order())
    core.handle(b"w0", Hello(worker="w0", incarnation=1, job="job", layout=LAYOUT.fingerprint, part="shard-0"), [])
    pull = Pull(request=1, job="job", term=1, worker="w0", incarnation=1, step=0, wants=(Want(0),))
    assert refusal(core.handle(b"w0", pull, [])) == "not-initialised"


def test_older_term_is_ignored_and_no_order_drops_the_job() -> None:
    driver = Driver()
    driver.core.take_order(order(term=3))
    driver.core.take_order(order(term=2))
    assert driver.core.serving is not None
    assert driver.core.serving.order.term == 3
    assert driver.weight == 0.0
    driver.core.take_order(None)
    assert refusal(driver.pull("w0")) == "wrong-job"


def test_messages_of_another_plane_are_refused() -> None:
    assert refusal(Driver().send("w0", Welcome(part="s", job="job", term=1))) == "not-served"


# ------------------------------------------------------------------------ consistency


def test_bounded_parks_the_fast_worker_until_the_slow_one_catches_up() -> None:
    driver = Driver(consistency={"mode": "bounded", "slack": 2}, members=("w0", "w1"))
    for step in (1, 2):
        driver.push("w0", step)
        assert isinstance(driver.pull("w0", step)[0].message, Pulled)
    driver.push("w0", 3)
    (held,) = driver.pull("w0", 3)
    assert isinstance(held.message, Held)
    (released,) = driver.send("w1", Tick(job="job", worker="w1", incarnation=1, step=1))
    assert (released.peer, type(released.message)) == (b"w0", Pulled)


def test_a_stranger_cannot_move_the_clock_of_a_worker() -> None:
    """A clock that was set far ahead would park the worker's pulls for ever."""
    driver = Driver(consistency={"mode": "bounded", "slack": 2}, members=("w0", "w1"))
    assert driver.send("stranger", Tick(job="job", worker="w0", incarnation=1, step=2**61)) == []
    assert driver.core.refusals["unknown-worker"] == 1
    driver.push("w0", 1)
    assert isinstance(driver.pull("w0", 1)[0].message, Pulled)


def test_every_held_pull_of_a_worker_is_answered_once() -> None:
    driver = Driver(consistency={"mode": "bounded", "slack": 0}, members=("w0", "w1"))
    for request in (11, 12, 12):
        assert isinstance(driver.pull("w0", 1, request=request)[0].message, Held)
    released = driver.send("w1", Tick(job="job", worker="w1", incarnation=1, step=1))
    assert [getattr(reply.message, "request", 0) for reply in released] == [11, 12]


def test_bounded_worker_without_a_lease_holds_nobody_up() -> None:
    driver = Driver(consistency={"mode": "bounded", "slack": 0}, members=("w0", "w1"))
    driver.push("w0", 1)
    assert isinstance(driver.pull("w0", 1)[0].message, Held)
    (released,) = driver.core.take_order(order(members=("w0",), consistency={"mode": "bounded", "slack": 0}))
    assert isinstance(released.message, Pulled)


def test_bounded_joiner_starts_at_the_slowest_clock() -> None:
    settings: dict[str, object] = {"consistency": {"mode": "bounded", "slack": 1}}
    driver = Driver(**settings, members=("w0",))
    for step in range(1, 50):
        driver.push("w0", step)
    driver.core.take_order(order(members=("w0", "w1"), **settings))
    driver.push("w0", 50)
    assert isinstance(driver.pull("w0", 50)[0].message, Pulled), "49 steps of history must not count against it"
    driver.push("w0", 51)
    assert isinstance(driver.pull("w0", 51)[0].message, Held)


def test_bounded_returner_after_a_rest_stops_nobody() -> None:
    settings: dict[str, object] = {"consistency": {"mode": "bounded", "slack": 1}}
    driver = Driver(**settings, members=("w0", "w1"))
    driver.core.take_order(order(members=("w0",), **settings))
    for step in range(1, 20):
        driver.push("w0", step)
    driver.core.take_order(order(members=("w0", "w1"), **settings))
    assert isinstance(driver.pull("w0", 19)[0].message, Pulled)


def test_bounded_clock_is_not_moved_by_a_message_that_was_overtaken() -> None:
    settings: dict[str, object] = {"consistency": {"mode": "bounded", "slack": 2}}
    driver = Driver(**settings, members=("w0", "w1"))
    for step in (1, 2, 1, 2, 1, 2):
        driver.send("w0", Tick(job="job", worker="w0", incarnation=1, step=step))
    assert isinstance(driver.pull("w0", 2)[0].message, Pulled)


def test_bounded_worker_that_connects_anew_stands_where_it_stood() -> None:
    settings: dict[str, object] = {"consistency": {"mode": "bounded", "slack": 2}}
    driver = Driver(**settings, members=("w0", "w1"))
    driver.send("w0", Tick(job="job", worker="w0", incarnation=1, step=2))
    driver.hello("w0")
    assert isinstance(driver.pull("w0", 0)[0].message, Pulled)
    assert isinstance(driver.pull("w0", 1)[0].message, Held), "two steps of its predecessor and one of its own"


def test_sync_applies_the_mean_of_a_round_once() -> None:
    driver = Driver(consistency={"mode": "sync"}, members=("w0", "w1"))
    pushed, held = driver.push("w0", 1, 1.0, wants=(Want(0, 0),))
    assert isinstance(pushed.message, Pushed)
    assert not pushed.message.values
    assert isinstance(held.message, Held)
    assert driver.state()[:2] == (0.0, 0)
    replies = driver.push("w1", 1, 3.0)
    assert driver.state()[:2] == (-2.0, 1)
    assert [(reply.peer, type(reply.message)) for reply in replies] == [(b"w1", Pushed), (b"w0", Pulled)]


def test_sync_duplicate_counts_once_in_its_round() -> None:
    driver = Driver(consistency={"mode": "sync"}, members=("w0", "w1"))
    driver.push("w0", 1, 1.0)
    driver.push("w0", 1, 1.0)
    driver.push("w1", 1, 3.0)
    assert driver.state()[:2] == (-2.0, 1)


def test_sync_quorum_closes_without_the_straggler_whose_push_joins_the_next_round() -> None:
    settings: dict[str, object] = {"consistency": {"mode": "sync", "quorum": 1}}
    driver = Driver(**settings, members=("w0", "w1"))
    driver.push("w0", 1, 1.0)
    assert driver.weight == -1.0
    driver.push("w1", 1, 1.0)
    assert driver.weight == -2.0


def test_sync_dead_member_completes_the_round_of_the_living() -> None:
    settings: dict[str, object] = {"consistency": {"mode": "sync"}}
    driver = Driver(**settings, members=("w0", "w1"))
    driver.push("w0", 1, 1.0, wants=(Want(0, 0),))
    (released,) = driver.core.take_order(order(members=("w0",), **settings))
    assert isinstance(released.message, Pulled)
    assert driver.weight == -1.0


def test_sync_residuals_after_the_last_round_count_as_its_share() -> None:
    settings: dict[str, object] = {"consistency": {"mode": "sync"}}
    driver = Driver(**settings, members=("w0", "w1"))
    driver.core.take_order(order(**settings))
    driver.push("w0", 1, 1.0)
    driver.push("w1", 1, 3.0)
    assert driver.weight == -2.0
    assert driver.core.serving is not None
    assert driver.core.serving.policy.pending_updates == 0


def test_gone_connections_are_forgotten_before_a_live_worker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramserver.shard.core.MAX_PEERS", 300)
    driver = Driver()
    gone: set[bytes] = set()
    driver.core.is_there = lambda peer: peer not in gone
    serving = driver.core.serving
    assert serving is not None
    for number in range(1000):
        assert isinstance(driver.hello(f"passing-{number}"), Welcome)
        gone.add(f"passing-{number}".encode())
        assert len(serving.peers) <= 2 * 64
    assert {b"w0", b"w1"} <= serving.peers.keys()
    for number in range(200):
        assert isinstance(driver.hello(f"staying-{number}"), Welcome)
    assert {f"staying-{number}".encode() for number in range(200)} <= serving.peers.keys(), "nobody who is there"
