"""Updates are applied once, whatever the network does; nothing that was to be sent is lost."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from worker_rig import DEADLINE_SECONDS, SHAPES, Rig, Shard, make_gradients, make_parameters, total

from paramserver.encoding import parse_encoding
from paramserver.job import PushSettings
from paramserver.protocol.memory import MemoryNetwork
from paramserver.protocol.messages import (
    Held,
    Hello,
    Pull,
    Push,
    Pushed,
    Refusal,
    RefusedUpdate,
    Tick,
)
from paramserver.protocol.transport import Received
from paramserver.shard.core import Reply
from worker.errors import Abandoned, JobFailure, WorkerError
from worker.replica import Replica


def test_pull_brings_what_a_push_changed() -> None:
    rig = Rig()
    gradients = rig.step(seed=3, step=1)
    for block in rig.layout.blocks:
        expected = -gradients[block.parameter].numpy().ravel()
        np.testing.assert_array_equal(rig.weights(block.index), expected)
        np.testing.assert_array_equal(rig.replica.values(block.index), expected)
    assert rig.replica.editions.tolist() == [1, 1, 1]


@pytest.mark.parametrize("encoding", ["fp32", "bf16", "int8", "int4", "fp4", "int2", "ternary", "sign", "topk"])
def test_every_update_is_applied_once_under_drops_duplicates_and_reordering(encoding: str) -> None:
    network = MemoryNetwork(seed=7, drop=0.15, duplicate=0.15, reorder=0.15, delay=(0.0, 0.05))
    rig = Rig(encoding, network)
    gradients = [rig.step(seed, seed) for seed in range(1, 31)]
    assert network.faults.dropped
    assert network.faults.duplicated
    assert network.faults.overtaken
    assert rig.counters.retries
    assert rig.updates() == 30 * len(SHAPES)
    for block in rig.layout.blocks:
        residual = rig.exchange.residuals.find(block.index)
        applied = -rig.weights(block.index) + (0.0 if residual is None else residual)
        np.testing.assert_allclose(applied, total(gradients, block.parameter), atol=2e-4)


def test_resent_push_has_identical_bytes_and_the_same_sequence() -> None:
    rig = Rig("int8")
    shard = rig.shards[0]
    shard.intercept = lambda received: [] if isinstance(received.message, Push) and len(shard.pushes()) < 3 else None
    rig.step(seed=1, step=1)
    pushes = shard.pushes()
    assert len(pushes) == 3
    assert pushes[0] == pushes[1] == pushes[2]
    assert rig.counters.retries == 2
    assert rig.updates() == len(SHAPES)


def test_lost_acknowledgement_asks_for_values_only_once_the_update_is_decided() -> None:
    rig = Rig()
    shard = rig.shards[0]

    def lose_values(received: Received) -> list[Reply] | None:
        if not isinstance(received.message, Push):
            return None
        replies = shard.core.handle(received.peer, received.message, received.frames)
        pushed = replies[0].message
        assert isinstance(pushed, Pushed)
        return [Reply(received.peer, msgspec.structs.replace(pushed, values=()))]

    shard.intercept = lose_values
    rig.step(seed=1, step=1)
    assert len(shard.pushes()) == 1
    assert rig.replica.editions.tolist() == [1, 1, 1]


def test_finally_refused_update_returns_to_the_residual_and_its_sequence_is_free() -> None:
    rig = Rig("int8")
    shard = rig.shards[0]

    def refuse(received: Received) -> list[Reply] | None:
        message = received.message
        if not isinstance(message, Push) or len(shard.pushes()) > 1:
            return None
        update = message.updates[0]
        rest = Push(
            request=message.request,
            job=message.job,
            term=message.term,
            worker=message.worker,
            incarnation=message.incarnation,
            step=message.step,
            updates=message.updates[1:],
            wants=message.wants,
        )
        replies = shard.core.handle(received.peer, rest, received.frames[1:])
        pushed = replies[0].message
        assert isinstance(pushed, Pushed)
        refused = RefusedUpdate(update.block, update.sequence, "unknown-edition", "for the test")
        answer = msgspec.structs.replace(pushed, refused=(refused,))
        return [Reply(received.peer, answer, replies[0].frames), *replies[1:]]

    shard.intercept = refuse
    first = rig.step(seed=1, step=1)
    residual = rig.exchange.residuals.of(0)
    np.testing.assert_allclose(residual, first["first.weight"].numpy().ravel(), atol=1e-6)
    assert rig.counters.refusals["unknown-edition"] == 1
    second = rig.step(seed=2, step=2)
    assert shard.pushes()[-1][0].updates[0].sequence == 1
    applied = -rig.weights(0) + rig.exchange.residuals.of(0)
    np.testing.assert_allclose(applied, total([first, second], "first.weight"), atol=1e-5)


def test_flush_empties_the_residual_at_full_precision() -> None:
    rig = Rig("int8")
    gradients = [rig.step(seed, seed) for seed in range(1, 6)]
    assert rig.exchange.residuals.norm() > 0
    rig.exchange.flush(6)
    assert rig.exchange.residuals.norm() == 0
    assert {update.encoding for update in rig.shards[0].pushes()[-1][0].updates} == {"fp32"}
    for block in rig.layout.blocks:
        np.testing.assert_allclose(-rig.weights(block.index), total(gradients, block.parameter), atol=1e-5)


@pytest.mark.parametrize(("encoding", "first"), [("int4", "int8/64"), ("sign", "int8/64"), ("int8", "int8/64")])
def test_the_first_updates_of_a_model_are_pushed_finely(encoding: str, first: str) -> None:
    rig = Rig(encoding, push={"settling_updates": 3})
    gradients = [rig.step(seed, seed) for seed in range(1, 6)]
    used = [push.updates[0].encoding for push, _ in rig.shards[0].pushes()]
    assert used == [first] * 3 + [f"{encoding}/64"] * 2
    for block in rig.layout.blocks:
        residual = rig.exchange.residuals.find(block.index)
        kept = 0 if residual is None else np.asarray(residual)
        applied = kept - rig.weights(block.index)
        np.testing.assert_allclose(applied, total(gradients, block.parameter), atol=1e-5)


@pytest.mark.parametrize("is_last", [False, True])
def test_the_last_flush_of_a_job_moves_the_weights_by_a_small_share_and_an_earlier_one_by_all(is_last: bool) -> None:
    rig = Rig("int8")
    for seed in range(1, 6):
        rig.step(seed, seed)
    before = [rig.weights(block.index).copy() for block in rig.layout.blocks]
    residuals = [np.array(rig.exchange.residuals.of(block.index)) for block in rig.layout.blocks]
    rig.exchange.flush(6, is_last)
    assert rig.exchange.residuals.norm() == 0
    assert any(residual.any() for residual in residuals)
    share = 1 / 9 if is_last else 1.0  # one worker, eight rounds
    for block, weights, residual in zip(rig.layout.blocks, before, residuals, strict=True):
        np.testing.assert_allclose(weights - rig.weights(block.index), share * residual, atol=1e-6)


def test_what_was_sent_and_the_residual_make_what_was_to_be_sent() -> None:
    rig = Rig("int8")
    gradients = [rig.step(seed, seed) for seed in range(1, 11)]
    sent = {block.index: np.zeros(block.elements, np.float64) for block in rig.layout.blocks}
    for shard in rig.shards:
        for push, frames in shard.pushes():
            for update, frame in zip(push.updates, frames, strict=True):
                decoded = np.empty(rig.layout.blocks[update.block].elements, np.float32)
                parse_encoding(update.encoding).decode(np.frombuffer(frame, np.uint8), decoded)
                sent[update.block] += decoded
    for block in rig.layout.blocks:
        np.testing.assert_allclose(
            sent[block.index] + rig.exchange.residuals.of(block.index), total(gradients, block.parameter), atol=1e-5
        )


def test_out_of_order_with_a_later_expectation_counts_as_acknowledged() -> None:
    rig = Rig()
    shard = rig.shards[1]

    def answer(received: Received) -> list[Reply] | None:
        message = received.message
        if not isinstance(message, Push):
            return None
        update = message.updates[0]
        shard.core.handle(received.peer, message, received.frames)
        refused = RefusedUpdate(update.block, update.sequence, "out-of-order", "later", update.sequence + 1)
        return [Reply(received.peer, Pushed(request=message.request, acknowledged=(), refused=(refused,)))]

    shard.intercept = answer
    rig.step(seed=1, step=1)
    assert rig.exchange.residuals.find(1) is None
    assert rig.updates() == len(SHAPES)


def test_shard_that_lost_acknowledged_updates_fails_the_job_by_name() -> None:
    rig = Rig()
    rig.step(seed=1, step=1)
    rig.step(seed=2, step=2)
    serving = rig.shards[0].core.serving
    assert serving is not None
    serving.blocks[0].marks.advance("w0", 1, 1)  # as if it had been restored from before the second push
    with pytest.raises(JobFailure, match="shard-0 expects update 2 of block 0.*lost acknowledged updates"):
        rig.step(seed=3, step=3)


def test_job_taken_up_again_goes_on_where_the_shard_is() -> None:
    """Of two updates that were on their way when the job was dropped, one arrived and one did not."""
    rig = Rig()
    first = rig.step(seed=1, step=1)
    second = make_gradients(2)
    rig.shards[0].intercept = lambda received: [] if isinstance(received.message, Push) else None
    rig.exchange.begin(second, rig.replica.editions.copy(), 2)
    rig.pump()
    assert rig.updates() == len(SHAPES) + 1, "one shard has the update, the other has not"
    rig.exchange.close()
    rig.shards[0].intercept = lambda received: None
    rig.exchange = rig.connect(is_resumed=True)
    rig.exchange.pull(2)
    later = [rig.step(seed, seed) for seed in (3, 4)]
    assert rig.updates() == 3 * len(SHAPES) + 1
    for block in rig.layout.blocks:
        applied = [first, *later] if block.index in rig.blocks[0] else [first, second, *later]
        np.testing.assert_allclose(-rig.weights(block.index), total(applied, block.parameter), atol=1e-5)


def test_job_taken_up_again_applies_every_update_once_under_drops_duplicates_and_reordering() -> None:
    network = MemoryNetwork(seed=7, drop=0.15, duplicate=0.15, reorder=0.15, delay=(0.0, 0.05))
    rig = Rig(network=network)
    gradients = []
    for seed in range(1, 31):
        if seed % 3 == 1:
            rig.exchange.close()
            rig.exchange = rig.connect(is_resumed=True)
            rig.exchange.pull(seed)
        gradients.append(rig.step(seed, seed))
    assert network.faults.duplicated
    assert network.faults.overtaken
    assert rig.updates() == 30 * len(SHAPES)
    for block in rig.layout.blocks:
        np.testing.assert_allclose(-rig.weights(block.index), total(gradients, block.parameter), atol=2e-4)


def test_job_taken_up_again_begins_anew_at_a_shard_that_has_begun_anew() -> None:
    rig = Rig()
    rig.step(seed=1, step=1)
    rig.exchange.close()
    for shard in rig.shards:
        shard.core.take_order(None)
    rig.order()
    rig.replica = Replica(make_parameters())
    rig.exchange = rig.connect(is_resumed=True)
    rig.exchange.initialise()
    rig.exchange.pull(1)
    rig.step(seed=2, step=2)
    assert rig.updates() == len(SHAPES)


def test_push_waits_for_the_term_of_a_new_order() -> None:
    rig = Rig()
    rig.step(seed=1, step=1)
    rig.order(term=2)
    asked = []

    def learn_the_term() -> None:
        asked.append(rig.network.now)
        if len(asked) == 8:
            rig.exchange.follow([msgspec.structs.replace(part, term=2) for part in rig.placement])

    rig.guard = learn_the_term
    rig.step(seed=2, step=2)
    assert rig.counters.refusals["wrong-term"] >= 1
    assert rig.updates() == 2 * len(SHAPES)


def test_a_worker_that_is_behind_learns_the_term_from_the_shard() -> None:
    rig = Rig()
    rig.step(seed=1, step=1)
    rig.order(term=2)
    rig.step(seed=2, step=2)
    assert rig.counters.refusals["wrong-term"] >= 1
    assert {shard.pushes()[-1][0].term for shard in rig.shards} == {2}
    assert rig.updates() == 2 * len(SHAPES)


def test_a_worker_that_is_ahead_of_a_shard_sends_it_nothing_until_it_has_its_order() -> None:
    rig = Rig()
    rig.step(seed=1, step=1)
    rig.exchange.follow([msgspec.structs.replace(part, term=2) for part in rig.placement])
    ordered_at = rig.network.now + 3 * DEADLINE_SECONDS

    def order_late() -> None:
        if rig.network.now >= ordered_at:
            rig.order(term=2)

    rig.guard = order_late
    before = len(rig.shards[0].pushes())
    rig.step(seed=2, step=2)
    assert rig.network.now >= ordered_at
    assert rig.network.now < ordered_at + DEADLINE_SECONDS, "it asks often enough"
    assert len(rig.shards[0].pushes()) - before == 2, "once too early, once when the shard was ready"
    assert rig.updates() == 2 * len(SHAPES)


def test_a_shard_that_answers_nothing_keeps_no_other_waiting() -> None:
    rig = Rig()
    rig.step(seed=1, step=1)
    rig.shards[0].intercept = lambda received: []
    rig.exchange.begin(make_gradients(2), rig.replica.editions.copy(), 2)
    rig.exchange.settle(patience_seconds=0.3)
    silent, other = rig.exchange._clients
    assert (silent.is_settled, other.is_settled) == (False, True)
    assert len(rig.shards[1].pushes()) == 2


@pytest.mark.parametrize("code", ["unknown-part", "wrong-term", "wrong-job", "unknown-worker"])
def test_what_a_shard_that_gave_a_part_away_refuses_waits_for_the_new_placement(code: str) -> None:
    """A primary that became a backup; the coordinator tells the worker later than it."""
    rig = Rig()
    rig.step(seed=1, step=1)
    old = rig.shards[0]
    new = Shard(rig.network, "elsewhere")
    new.core = old.core
    assert new.core.serving is not None
    new.core.serving.peers.clear()
    refused = [0]

    def refuse(received: Received) -> list[Reply]:
        refused[0] += 1
        request = getattr(received.message, "request", 0)
        return [Reply(received.peer, Refusal(request=request, code=code, detail="not here"))]  # type: ignore[arg-type]

    old.intercept = refuse
    told_at = rig.network.now + 2 * DEADLINE_SECONDS

    def tell() -> None:
        if rig.network.now >= told_at:
            rig.order(term=2)
            moved = msgspec.structs.replace(rig.placement[0], address=new.listener.address, term=2)
            rig.exchange.follow([moved, msgspec.structs.replace(rig.placement[1], term=2)])

    rig.guard = tell
    rig.shards[0] = new

    def pump() -> None:
        old.pump()
        rig.pump()

    rig.network.idle = pump
    rig.step(seed=2, step=2)
    assert 1 < refused[0] < 20
    assert rig.network.now < told_at + DEADLINE_SECONDS, "the new primary has the update at once"
    assert rig.updates() == 2 * len(SHAPES)


def test_push_to_blocks_without_a_value_is_repeated_until_they_have_one() -> None:
    rig = Rig(initialise=False)
    other = rig.connect("w1")
    calls = []

    def initialise_later() -> None:
        calls.append(0)
        if len(calls) == 5:
            rig.guard = lambda: None
            other.initialise()

    rig.guard = initialise_later
    rig.step(seed=1, step=1)
    assert rig.counters.refusals["not-initialised"] >= 1
    assert rig.updates() == len(SHAPES)


def test_forgotten_hello_is_said_again() -> None:
    rig = Rig()
    for shard in rig.shards:
        assert shard.core.serving is not None
        shard.core.serving.peers.clear()
    rig.step(seed=1, step=1)
    assert rig.counters.refusals["unknown-worker"] == 2
    assert sum(isinstance(message, Hello) for message, _ in rig.shards[0].heard) == 2
    assert rig.updates() == len(SHAPES)


def test_silent_shard_is_connected_anew_and_its_updates_are_applied_once() -> None:
    rig = Rig()
    address = rig.placement[0].address
    rig.network.cut(address)
    started = rig.network.now

    def heal_later() -> None:
        if rig.network.now - started > 5 * DEADLINE_SECONDS:
            rig.network.heal(address)

    rig.guard = heal_later
    rig.step(seed=1, step=1)
    assert rig.counters.reconnections >= 1
    assert rig.updates() == len(SHAPES)


def test_wrong_layout_fails_the_job_and_a_newer_namesake_ends_the_process() -> None:
    rig = Rig()
    for code, failure in (
        ("wrong-layout", JobFailure),
        ("old-incarnation", WorkerError),
        ("wrong-version", WorkerError),
    ):
        exchange = rig.connect()
        rig.shards[0].intercept = lambda received, code=code: [
            Reply(received.peer, Refusal(code=code, detail="for the test"))
        ]
        with pytest.raises(failure, match="for the test"):
            exchange.pull(0)


def test_a_wait_ends_when_the_guard_says_so() -> None:
    rig = Rig()
    rig.shards[0].intercept = lambda received: []
    until = rig.network.now + 3.0

    def end() -> None:
        if rig.network.now > until:
            raise Abandoned("over")

    rig.guard = end
    with pytest.raises(Abandoned):
        rig.step(seed=1, step=1)
    assert rig.network.now < until + 1.0


def test_held_pull_is_waited_for_without_reconnecting() -> None:
    rig = Rig(members=("w0", "slow"), consistency={"mode": "bounded", "slack": 0})
    released = rig.network.now + 10 * DEADLINE_SECONDS

    def release() -> None:
        if rig.network.now > released:
            rig.order(members=("w0",))

    rig.guard = release
    rig.step(seed=1, step=1)
    assert any(isinstance(message, Push) for message, _ in rig.shards[0].heard)
    assert rig.counters.reconnections == 0
    assert rig.network.now > released
    assert rig.replica.editions.tolist() == [1, 1, 1]


def test_pushes_are_settled_while_pulls_are_held() -> None:
    rig = Rig(members=("w0", "slow"), consistency={"mode": "bounded", "slack": 0})
    rig.exchange.begin(make_gradients(1), rig.replica.editions.copy(), 1)
    rig.exchange.settle_pushes()
    assert rig.updates() == len(SHAPES)
    rig.exchange.abandon_pulls()
    rig.exchange.settle()
    assert rig.replica.editions.tolist() == [-1, -1, -1]


def test_shard_that_no_gradient_touches_hears_the_clock() -> None:
    rig = Rig()
    gradients = {name: g for name, g in make_gradients(1).items() if name != "first.bias"}
    rig.exchange.begin(gradients, rig.replica.editions.copy(), 4)
    rig.exchange.settle()
    assert [message.step for message, _ in rig.shards[1].heard if isinstance(message, Tick)] == [4]
    assert not any(isinstance(message, Tick) for message, _ in rig.shards[0].heard)


def test_staleness_is_counted_against_the_edition_that_gradients_were_computed_on() -> None:
    rig = Rig()
    computed_on = rig.replica.editions.copy()
    rig.exchange.pull(0)
    rig.step(seed=1, step=1)
    rig.exchange.begin(make_gradients(2), np.maximum(computed_on, 0), 2)
    rig.exchange.settle()
    assert [push.updates[0].edition for push, _ in rig.shards[1].pushes()] == [0, 0]


def test_unusable_value_is_asked_for_again_and_never_written() -> None:
    rig = Rig()
    shard = rig.shards[1]
    spoiled = []

    def spoil(received: Received) -> list[Reply] | None:
        if not isinstance(received.message, Push) or spoiled:
            return None
        spoiled.append(1)
        (reply,) = shard.core.handle(received.peer, received.message, received.frames)
        return [Reply(reply.peer, reply.message, [memoryview(bytes(8))])]

    shard.intercept = spoil
    rig.step(seed=1, step=1)
    assert spoiled
    assert rig.counters.refusals["wrong-size"] == 1
    assert np.isfinite(rig.replica.values(1)).all()
    assert rig.replica.editions.tolist() == [1, 1, 1]


def test_large_step_is_cut_and_every_held_part_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.cutting.CUT_BYTES", 256)
    rig = Rig(members=("w0", "slow"), consistency={"mode": "bounded", "slack": 0})
    released = rig.network.now + 2 * DEADLINE_SECONDS
    rig.guard = lambda: rig.order(members=("w0",)) if rig.network.now > released else None
    rig.step(seed=1, step=1)
    assert [len(push.updates) for push, _ in rig.shards[0].pushes()[:2]] == [1, 1]
    assert rig.replica.editions.tolist() == [1, 1, 1]


def test_pulls_in_flight_are_bounded_whatever_the_model_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard keeps a snapshot of every block that is asked for until it has left: so not all are asked for at once."""
    monkeypatch.setattr("worker.cutting.CUT_BYTES", 256)
    monkeypatch.setattr("worker.exchange.IN_FLIGHT", 1)
    rig = Rig()
    shard, waited = rig.shards[0], rig.network.now + DEADLINE_SECONDS / 2
    shard.intercept = lambda received: [] if isinstance(received.message, Pull) else None

    def give_up() -> None:
        if rig.network.now > waited:
            raise TimeoutError

    rig.guard = give_up
    shard.heard.clear()
    with pytest.raises(TimeoutError):
        rig.exchange.pull(1)
    assert [len(message.wants) for message, _ in shard.heard if isinstance(message, Pull)] == [1]  # it holds two blocks


def test_buffers_are_used_again_after_an_answer() -> None:
    rig = Rig("int8")
    encodings = PushSettings(encoding="int8").encodings(rig.layout)
    sizes = [e.frame_bytes(block.elements) for e, block in zip(encodings, rig.layout.blocks, strict=True)]
    rig.step(seed=1, step=1)
    buffers = {id(rig.exchange._pool.take(size)) for size in sizes}
    assert len(buffers) == len(sizes)
    assert not rig.exchange._pool._free[sizes[0]]
    rig.step(seed=2, step=2)
    assert len(rig.exchange._pool._free[sizes[0]]) == 1


def test_bytes_are_counted_with_their_heads() -> None:
    rig = Rig()
    before = rig.counters.push_bytes
    rig.step(seed=1, step=1)
    payload = sum(4 * block.elements for block in rig.layout.blocks)
    assert payload < rig.counters.push_bytes - before < payload + 400
    assert payload < rig.counters.pull_bytes


def test_gradient_that_is_not_the_models_is_refused() -> None:
    rig = Rig()
    with pytest.raises(ValueError, match=r"gradient 'first.bias' of shape \(41,\): the parameter has shape \(40,\)"):
        rig.exchange.begin({"first.bias": torch.zeros(41)}, rig.replica.editions, 1)
    with pytest.raises(ValueError, match="no such parameter"):
        rig.exchange.begin({"other": torch.zeros(1)}, rig.replica.editions, 1)


def test_held_is_a_word_from_a_living_shard() -> None:
    rig = Rig()
    shard = rig.shards[0]
    until = rig.network.now + 20 * DEADLINE_SECONDS

    def hold(received: Received) -> list[Reply] | None:
        request = getattr(received.message, "request", 0)
        if rig.network.now > until or isinstance(received.message, Push):
            return None if rig.network.now > until else [Reply(received.peer, Held(request=request))]
        return None

    shard.intercept = hold
    rig.step(seed=1, step=1)
    assert rig.counters.reconnections == 0
    assert rig.updates() == len(SHAPES)


def test_weights_that_diverged_fail_the_job_with_the_mend() -> None:
    rig = Rig()
    shard = rig.shards[0]
    assert shard.core.serving is not None
    for block in shard.core.serving.blocks.values():
        block.weights[0] = np.inf
        block.version += 1
    with pytest.raises(JobFailure, match="not finite any more: training has diverged; lower optimizer.lr"):
        rig.exchange.pull(1)


def test_a_shard_that_is_back_at_another_address_gets_what_it_did_not_answer_and_applies_it_once() -> None:
    rig = Rig()
    rig.step(1, 1)
    old = rig.shards[0]
    applied: list[Reply] = []

    def dies(received: Received) -> list[Reply]:
        # The update is in its journal, and the acknowledgement does not leave any more.
        applied.extend(old.core.handle(received.peer, received.message, received.frames))
        return []

    old.intercept = dies
    rig.exchange.begin(make_gradients(2), rig.replica.editions.copy(), 2)
    rig.exchange.settle(patience_seconds=0.5 * DEADLINE_SECONDS)
    assert applied, "the shard died before it had the update"
    back = Shard(rig.network, "elsewhere")
    back.core = old.core
    assert back.core.serving is not None
    back.core.serving.peers.clear()
    rig.shards[0] = back
    old.listener.close()
    placement = [msgspec.structs.replace(rig.placement[0], address=back.listener.address), rig.placement[1]]
    rig.exchange.follow(placement)
    rig.exchange.settle()
    rig.step(3, 3)
    assert rig.updates() == 3 * len(rig.layout.blocks)
    assert rig.counters.reconnections == 1
