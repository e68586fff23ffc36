"""The published replica, driven message by message: what every worker holds is what the shard published."""

from __future__ import annotations

import json

import numpy as np
import pytest

from paramserver.encoding import make_encoding, parse_encoding
from paramserver.protocol.framing import MAX_FRAMES
from paramserver.protocol.layout import Layout, Parameter, cut_layout
from paramserver.protocol.messages import (
    BlockUpdate,
    Hello,
    Initialise,
    Member,
    Message,
    PartOrder,
    Pull,
    Pulled,
    Push,
    Pushed,
    Want,
)
from paramserver.shard.core import Reply, ShardCore
from paramserver.shard.publishing import MAX_EDITIONS, PublishedBlock, PublishedDeltas

LAYOUT: Layout = cut_layout([Parameter("matrix", (40, 70), "one"), Parameter("bias", (30,), "one")])
ELEMENTS = LAYOUT.blocks[0].elements
LOW = ["int8", "int4", "fp4", "int2", "ternary", "sign", "topk", "bf16", "fp32"]


class Cluster:
    """One shard core with published deltas, and workers that keep a replica as `worker` does."""

    def __init__(self, encoding: str = "ternary", workers: int = 2, mode: str = "async", **pull: object) -> None:
        specification = {
            "name": "job",
            "model": {"family": "recurrent"},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "consistency": {"mode": mode},
            "cluster": {"workers": workers},
            "pull": {"encoding": encoding, "fresh": False, **pull},
        }
        self.core = ShardCore("shard-0")
        self.specification = json.dumps(specification)
        self.order()
        first = np.random.default_rng(0).normal(0, 0.1, ELEMENTS).astype(np.float32)
        frames = [memoryview(first.tobytes()), memoryview(bytes(4 * 30))]
        self.send("w0", Initialise(request=1, job="job", term=1, layout=LAYOUT.fingerprint, blocks=(0, 1)), frames)
        self.names = [f"w{number}" for number in range(workers)]
        self.sequences = dict.fromkeys(self.names, 0)
        self.values: dict[str, np.ndarray] = {}
        self.editions = dict.fromkeys(self.names, -1)
        self.kinds: list[str] = []
        for name in self.names:
            self.send(name, Hello(worker=name, incarnation=1, job="job", layout=LAYOUT.fingerprint, part="shard-0"))

    def send(self, worker: str, message: Message, frames: list[memoryview] | None = None) -> list[Reply]:
        return self.core.handle(worker.encode(), message, frames or [])

    def order(self, *members: str) -> None:
        order = PartOrder(
            part="shard-0",
            job="job",
            specification=self.specification,
            term=1,
            phase=0,
            layout=LAYOUT,
            blocks=(0, 1),
            members=tuple(Member(name, 1) for name in members),
        )
        self.core.take_order(order)

    @property
    def publishing(self) -> PublishedDeltas:
        assert self.core.serving is not None
        assert isinstance(self.core.serving.publishing, PublishedDeltas)
        return self.core.serving.publishing

    @property
    def published(self) -> PublishedBlock:
        return self.publishing.replica(0)

    @property
    def weights(self) -> np.ndarray:
        assert self.core.serving is not None
        return self.core.serving.blocks[0].weights

    def push(
        self, worker: str, seed: int = 0, edition: int | None = None, scale: float = 1.0, is_pull_slow: bool = False
    ) -> list[Reply]:
        """A random gradient of the matrix."""
        self.sequences[worker] += 1
        gradient = np.random.default_rng(seed).normal(0, scale, ELEMENTS).astype(np.float32)
        held = max(0, self.editions[worker]) if edition is None else edition
        update = BlockUpdate(0, self.sequences[worker], held, "fp32")
        head = {"request": 2, "job": "job", "term": 1, "worker": worker, "incarnation": 1}
        message = Push(**head, step=1, updates=(update,), is_pull_slow=is_pull_slow)  # type: ignore[arg-type]
        return self.send(worker, message, [memoryview(gradient.tobytes())])

    def ask(self, worker: str, source: str = "replica", have: int | None = None) -> Reply:
        head = {"request": 3, "job": "job", "term": 1, "worker": worker, "incarnation": 1}
        want = Want(0, self.editions[worker] if have is None else have)
        (reply,) = self.send(worker, Pull(**head, step=1, wants=(want,), source=source))  # type: ignore[arg-type]
        assert isinstance(reply.message, Pulled)
        return reply

    def pull(self, worker: str) -> str:
        """Bring the worker's replica up to date from the bytes of the answer alone; what kind of answer it was."""
        reply = self.ask(worker)
        (value,) = reply.message.values  # type: ignore[attr-defined]
        self.kinds.append(value.kind)
        if value.kind == "snapshot":
            self.values[worker] = np.empty(ELEMENTS, np.float32)
            parse_encoding(value.encoding).decode(reply.frames[0], self.values[worker])
        elif value.kind == "deltas":
            assert value.edition - self.editions[worker] == len(reply.frames), "a delta an edition"
            for frame in reply.frames:
                parse_encoding(value.encoding).decode_add(frame, self.values[worker])
        self.editions[worker] = value.edition
        return str(value.kind)


@pytest.mark.parametrize("encoding", LOW)
def test_every_replica_is_bit_identical_to_the_published_one(encoding: str) -> None:
    cluster = Cluster(encoding, workers=3)
    order = np.random.default_rng(7).integers(0, 3, 60)
    for turn, number in enumerate(order):
        worker = cluster.names[number]
        cluster.pull(worker)
        cluster.push(worker, seed=turn)
    for worker in cluster.names:
        cluster.pull(worker)
        assert cluster.editions[worker] == cluster.published.edition > 10
        np.testing.assert_array_equal(cluster.values[worker].view(np.uint32), cluster.published.values.view(np.uint32))


@pytest.mark.parametrize("encoding", ["int4", "ternary", "sign"])
def test_what_a_delta_loses_is_in_the_next_one(encoding: str) -> None:
    cluster = Cluster(encoding, workers=1, publish_every=1)
    for seed in range(40):
        cluster.push("w0", seed)
    at_rest = []
    for _ in range(200):
        cluster.published.unseen = 1
        cluster.publishing.publish_due(0.0)
        cluster.publishing.publish_due(1e9)
        at_rest.append(float(np.abs(cluster.weights - cluster.published.values).max()))
    assert at_rest[-1] < 0.05 * at_rest[0], "published deltas alone must lead the replica to the weights"


@pytest.mark.parametrize(("pushers", "period"), [(1, 1), (2, 1), (3, 2), (4, 2), (8, 4)])
def test_an_edition_comes_after_half_the_active_pushers(pushers: int, period: int) -> None:
    cluster = Cluster(workers=8)
    for turn in range(20 * pushers):
        cluster.push(cluster.names[turn % pushers], turn)
    before = cluster.published.edition
    for turn in range(period * pushers):
        cluster.push(cluster.names[turn % pushers], turn)
    assert cluster.published.edition - before == pushers


@pytest.mark.parametrize(
    ("pushers", "slow", "period"), [(1, 1, 1), (2, 1, 1), (2, 2, 2), (3, 3, 3), (4, 2, 3), (8, 3, 5), (8, 8, 8)]
)
def test_pushers_whose_pulls_are_slow_lengthen_the_period_to_at_most_their_number(
    pushers: int, slow: int, period: int
) -> None:
    cluster = Cluster(workers=8)
    for turn in range(20 * pushers):
        cluster.push(cluster.names[turn % pushers], turn, is_pull_slow=turn % pushers < slow)
    assert cluster.publishing.period() == period
    for turn in range(20 * pushers):
        cluster.push(cluster.names[turn % pushers], turn)
    assert cluster.publishing.period() == max(1, -(-pushers // 2)), "and back, when they say so no more"


def test_a_slow_worker_that_is_gone_lengthens_no_period() -> None:
    cluster = Cluster(workers=8)
    for turn in range(40):
        cluster.push(cluster.names[turn % 4], turn, is_pull_slow=True)
    for turn in range(200):
        cluster.push(cluster.names[turn % 2], turn)
    assert cluster.publishing.period() == 1


def test_the_same_pushes_make_the_same_editions_whoever_is_slow() -> None:
    def editions() -> list[bytes]:
        cluster = Cluster("coded", workers=4)
        for turn, number in enumerate(np.random.default_rng(3).integers(0, 4, 60)):
            cluster.push(cluster.names[number], turn, is_pull_slow=turn > 20 and number < 3)
        return [frame.tobytes() for frame in cluster.published.log]

    assert editions() == editions()


def test_what_is_published_when_training_is_over_brings_the_replica_to_the_weights() -> None:
    distances = []
    for is_over in (False, True):
        cluster = Cluster("coded", workers=2)
        cluster.order("w0", "w1")
        for worker in cluster.names:
            cluster.pull(worker)
        for turn in range(10):
            cluster.push(cluster.names[turn % 2], turn)
        if is_over:
            cluster.order()
            cluster.order()  # said again, it means the same
            assert cluster.core.publish_due(now=10.0) == 1, "draining waits for it"
        else:
            assert cluster.core.publish_due(now=10.0) == 0
        assert cluster.core.publish_due(now=20.0) == 0
        distances.append(float(np.linalg.norm(cluster.weights - cluster.published.values)))
        assert cluster.pull("w0") == "deltas"
        np.testing.assert_array_equal(cluster.values["w0"].view(np.uint32), cluster.published.values.view(np.uint32))
    assert distances[1] < distances[0] / 8


def test_a_pause_of_training_costs_no_edition_that_training_would_not() -> None:
    cluster = Cluster("coded", workers=1)
    cluster.push("w0")
    before = cluster.published.edition
    assert cluster.core.publish_due(now=10.0) == 0, "a script without a coordinator has no members, ever"
    cluster.order("w0")
    assert cluster.core.publish_due(now=20.0) == 0
    assert cluster.published.edition == before


def test_a_worker_that_is_gone_stops_counting_as_a_pusher() -> None:
    cluster = Cluster(workers=8)
    for turn in range(80):
        cluster.push(cluster.names[turn % 8], turn)
    for turn in range(200):
        cluster.push(cluster.names[turn % 2], turn)
    before = cluster.published.edition
    for turn in range(10):
        cluster.push(cluster.names[turn % 2], turn)
    assert cluster.published.edition - before == 10


def test_publish_every_overrides_the_number_of_pushers() -> None:
    cluster = Cluster(workers=2, publish_every=5)
    for turn in range(10):
        cluster.push(cluster.names[turn % 2], turn)
    assert cluster.published.edition == 2


def test_sync_publishes_once_a_round() -> None:
    cluster = Cluster(workers=4, mode="sync")
    for turn in range(8):
        cluster.push(cluster.names[turn % 4], turn)
    assert cluster.core.serving is not None
    assert cluster.core.serving.blocks[0].version == cluster.published.edition == 2


def test_the_timer_publishes_what_waits_too_long() -> None:
    cluster = Cluster(publish_every=100, publish_seconds=0.5)
    cluster.push("w0")
    assert cluster.core.publish_due(now=10.0) == 1
    assert cluster.core.publish_due(now=10.4) == 1
    assert cluster.published.edition == 0
    assert cluster.core.publish_due(now=10.6) == 0
    assert cluster.published.edition == 1
    assert cluster.core.publish_due(now=20.0) == 0
    assert cluster.published.edition == 1, "nothing new: nothing to publish"


def test_a_delta_is_encoded_once_for_all_workers() -> None:
    cluster = Cluster(workers=3)
    for worker in cluster.names:
        cluster.pull(worker)
    for turn in range(4):
        cluster.push("w0", turn)
    frames = [cluster.ask(worker).frames for worker in cluster.names]
    assert len(frames[0]) > 1
    for other in frames[1:]:
        assert all(one is two for one, two in zip(frames[0], other, strict=True)), "the same bytes, not equal ones"


def test_the_frames_of_the_log_are_never_handed_to_the_pool() -> None:
    cluster = Cluster(workers=2)
    cluster.pull("w0")
    cluster.push("w0")
    reply = cluster.ask("w0")
    assert reply.frames
    assert not reply.loaned


@pytest.mark.parametrize("encoding", ["int8", "ternary", "sign"])
def test_a_worker_too_far_behind_gets_a_snapshot_of_the_published_value(encoding: str) -> None:
    cluster = Cluster(encoding, workers=2, publish_every=1)
    cluster.pull("w0")
    logged = 4 * ELEMENTS // make_encoding(encoding).frame_bytes(ELEMENTS)
    for turn in range(logged):
        cluster.push("w1", turn)
    assert cluster.pull("w0") == "deltas"
    for turn in range(logged + 1):
        cluster.push("w1", turn)
    assert cluster.pull("w0") == "snapshot"
    np.testing.assert_array_equal(cluster.values["w0"], cluster.published.values)
    assert not np.array_equal(cluster.values["w0"], cluster.weights), "the value, never the weights"


@pytest.mark.parametrize("encoding", ["ternary", "sign", "coded"])
def test_a_worker_4x_slower_than_seven_others_stays_out_of_snapshot_mode(encoding: str) -> None:
    cluster = Cluster(encoding, workers=8)
    fast = cluster.names[1:]
    for worker in cluster.names:
        assert cluster.pull(worker) == "snapshot"
    for turn in range(48):
        for worker in fast if turn % 4 else cluster.names:
            cluster.push(worker, seed=turn)
            assert cluster.pull(worker) != "snapshot"


def test_the_log_holds_at_most_one_snapshots_bytes() -> None:
    cluster = Cluster("sign", workers=1, publish_every=1)
    for turn in range(100):
        cluster.push("w0", turn)
        assert sum(frame.size for frame in cluster.published.log) == cluster.published.log_bytes <= 4 * ELEMENTS


def test_an_answer_never_has_more_frames_than_a_message_may() -> None:
    cluster = Cluster("sign", workers=1, publish_every=1)
    cluster.pull("w0")
    for turn in range(20):
        cluster.push("w0", turn)
    block = cluster.core.serving.blocks[0]  # type: ignore[union-attr]
    few = cluster.publishing.value(block, 0, 3, cluster.core.pool, None)
    assert few.kind == "snapshot"
    assert len(few.frames) == 1
    assert cluster.publishing.value(block, 0, MAX_FRAMES, cluster.core.pool, None).kind == "deltas"


def test_staleness_counts_from_the_publish_that_the_worker_computed_on() -> None:
    cluster = Cluster(workers=1, publish_every=3)
    for turn in range(7):
        cluster.push("w0", turn, edition=0)
    cluster.push("w0", edition=2)  # published at version 6; now it is 7
    assert cluster.core.serving is not None
    (row,) = cluster.core.serving.telemetry.staleness_rows()
    assert row.total == sum(range(7)) + 1


def test_staleness_of_a_forgotten_edition_counts_from_the_oldest_that_is_known() -> None:
    replica = PublishedBlock(np.zeros(4, np.float32), 0)
    for version in range(1, 2 * MAX_EDITIONS):
        replica.append(np.zeros(1, np.uint8), version, log_limit=16)
    assert replica.version_at(replica.edition) == 2 * MAX_EDITIONS - 1
    assert replica.version_at(replica.edition - 100) == 2 * MAX_EDITIONS - 101
    assert 0 < replica.version_at(0) <= MAX_EDITIONS


@pytest.mark.parametrize("edition", [1, 2**40])
def test_an_update_for_an_edition_that_was_never_published_is_refused(edition: int) -> None:
    cluster = Cluster()
    before = cluster.weights.copy()
    (reply,) = cluster.push("w0", edition=edition)
    assert isinstance(reply.message, Pushed)
    assert [refused.code for refused in reply.message.refused] == ["unknown-edition"]
    np.testing.assert_array_equal(cluster.weights, before)


@pytest.mark.parametrize("have", [5, 2**40])
def test_a_pull_from_an_edition_that_was_never_published_gets_a_snapshot(have: int) -> None:
    cluster = Cluster()
    (value,) = cluster.ask("w0", have=have).message.values  # type: ignore[attr-defined]
    assert (value.kind, value.edition) == ("snapshot", 0)


def test_weights_are_given_at_full_precision_to_one_that_evaluates() -> None:
    cluster = Cluster(publish_every=100)
    cluster.push("w0")
    reply = cluster.ask("w0", source="weights")
    (value,) = reply.message.values  # type: ignore[attr-defined]
    assert value.kind == "weights"
    np.testing.assert_array_equal(reply.frames[0].view(np.float32), cluster.weights)
    assert len(reply.loaned) == 1


def test_biases_are_published_at_full_precision_unless_a_rule_names_them() -> None:
    for layers, expected in (({}, "fp32"), ({"bi*": "int8"}, "int8/64"), ({"one": "int4"}, "int4/64")):
        cluster = Cluster(layers=layers)
        assert cluster.core.serving is not None
        assert cluster.core.serving.pull_encodings[1].identifier == expected


def test_the_distance_of_the_replica_is_measured() -> None:
    cluster = Cluster(publish_every=100)
    assert cluster.publishing.replica_distance() == 0.0
    cluster.push("w0")
    distance = np.linalg.norm(cluster.weights - cluster.published.values) / np.linalg.norm(cluster.weights)
    assert cluster.publishing.replica_distance() == pytest.approx(distance, rel=1e-5)


def test_a_block_that_hardly_moves_is_held_back_for_a_bounded_number_of_periods() -> None:
    cluster = Cluster(workers=1, still=0.5, still_periods=4)
    editions = []
    for turn in range(20):
        cluster.push("w0", turn, scale=1e-6)
        editions.append(cluster.published.edition)
    assert editions[0] == 0, "it was measured, and it is still"
    assert editions[4] == 1, "after four periods it goes out all the same"
    assert editions[-1] == 4
    assert [cluster.pull("w0") for _ in range(2)] == ["snapshot", "current"]


def test_a_block_that_moves_again_is_published_every_period() -> None:
    cluster = Cluster(workers=1, still=1e-3, still_periods=4)
    for turn in range(10):
        cluster.push("w0", turn, scale=1e-9)
    before = cluster.published.edition
    for turn in range(10):
        cluster.push("w0", turn, scale=1.0)
    assert cluster.published.edition - before >= 6, "held back for the rest of its four periods, and no longer"


def test_a_block_that_moves_is_never_held_back() -> None:
    cluster = Cluster(workers=1)
    for turn in range(100):
        cluster.push("w0", turn)
    assert cluster.published.edition == 100


def test_the_timer_publishes_a_block_that_is_held_back() -> None:
    cluster = Cluster(workers=1, still=0.5, publish_seconds=0.5)
    cluster.push("w0", scale=1e-6)
    assert cluster.core.publish_due(now=10.0) == 1
    assert cluster.core.publish_due(now=11.0) == 1
    assert cluster.core.publish_due(now=12.1) == 0
    assert cluster.published.edition == 1
