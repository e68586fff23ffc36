"""The hot path: what overlaps, what is clipped, what is skipped, and when a lease is done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from worker_rig import SHAPES, CountingTask, ListedLeases, Rig

from models.task import DataError
from paramserver.protocol.messages import Lease, Pull, Tick
from worker.errors import JobFailure
from worker.replica import Replica
from worker.stages import evaluate
from worker.train import Trainer, clip_, global_norm


class Training:
    """A trainer of CountingTask on a rig."""

    def __init__(self, leases: int = 2, overlap: bool = True, clip: float | None = None, **more: Any) -> None:
        self.rig = Rig()
        self.task = CountingTask()
        self.replica = Replica(self.task.parameters())
        self.exchange = self.rig.connect(replica=self.replica)
        self.exchange.pull(0)
        self.source = ListedLeases([Lease(number, "train", examples=(number,)) for number in range(1, leases + 1)])
        self.trainer = Trainer(
            self.task,
            self.replica,
            self.exchange,
            self.source,
            self.rig.counters,
            clip,
            **{"patience": 0.0 if overlap else math.inf, **more},
        )


def test_in_turn_every_batch_sees_every_update_before_it() -> None:
    training = Training(overlap=False)
    training.trainer.run()
    assert training.task.seen == [0.0, -1.0, -2.0, -3.0]


def test_overlap_leaves_exactly_one_exchange_in_flight_while_the_next_batch_is_computed() -> None:
    training = Training(overlap=True)
    in_flight = []
    training.task.on_gradients = lambda: in_flight.append(len(training.exchange._clients[0].requests))
    training.trainer.run()
    assert training.task.seen == [0.0, 0.0, -1.0, -2.0]
    assert in_flight == [0, 1, 1, 1]
    np.testing.assert_array_equal(training.rig.weights(0), np.full(128, -4.0))


@pytest.mark.parametrize(
    ("computing_seconds", "seen"), [(100.0, [0.0, -1.0, -2.0, -3.0]), (0.0, [0.0, 0.0, -1.0, -2.0])]
)
def test_auto_waits_for_an_exchange_that_is_short_beside_the_computation(
    computing_seconds: float, seen: list[float]
) -> None:
    now = 0.0

    def clock() -> float:
        return now

    def compute() -> None:
        nonlocal now
        now += computing_seconds

    training = Training(patience=0.5, clock=clock)
    training.task.on_gradients = compute
    training.trainer.run()
    assert training.task.seen == seen


def test_overlapped_update_names_the_edition_that_it_was_computed_on() -> None:
    training = Training(overlap=True)
    training.trainer.run()
    editions = [push.updates[0].edition for push, _ in training.rig.shards[0].pushes()]
    assert editions == [0, 0, 1, 2]


@pytest.mark.parametrize("overlap", [True, False])
def test_lease_is_done_once_and_only_after_its_updates_are_applied(overlap: bool) -> None:
    training = Training(leases=3, overlap=overlap)
    applied = []
    finish = training.source.finish

    def finished(result: object) -> None:
        applied.append(training.rig.updates())
        finish(result)  # type: ignore[arg-type]

    training.source.finish = finished  # type: ignore[method-assign, assignment]
    training.trainer.run()
    assert [result.number for result in training.source.results] == [1, 2, 3]
    assert all(count >= 2 * len(SHAPES) * (index + 1) for index, count in enumerate(applied))
    result = training.source.results[0]
    assert (result.steps, result.elements, result.loss_sum, result.metrics) == (2, 20, 40.0, {"right": 6.0})
    assert training.rig.counters.metrics == {"right": pytest.approx(0.3)}, "of the last steps, an element"
    assert training.rig.counters.finished_examples == 3.0
    assert training.rig.counters.steps == 6


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_step_that_is_not_finite_is_skipped_counted_and_never_pushed(spoil: str) -> None:
    training = Training(leases=2, overlap=False)
    task = training.task

    def spoil_second() -> None:
        is_second = len(task.seen) == 1
        task.loss = math.nan if is_second and spoil == "loss" else 2.0
        task.gradient = math.inf if is_second and spoil == "gradient" else 1.0

    batches = task.batches
    task.batches = lambda split, examples: (spoil_second() or batch for batch in batches(split, examples))  # type: ignore[method-assign,func-returns-value]
    training.trainer.run()
    assert [result.skipped_steps for result in training.source.results] == [1, 0]
    assert [result.steps for result in training.source.results] == [1, 2]
    assert training.rig.counters.skipped_steps == 1
    for shard in training.rig.shards:
        assert [push.step for push, _ in shard.pushes()] == [1, 3, 4]
        assert [message.step for message, _ in shard.heard if isinstance(message, Tick)] == [2]
        assert 2 in [message.step for message, _ in shard.heard if isinstance(message, Pull)]
    np.testing.assert_array_equal(training.rig.weights(0), np.full(128, -3.0))


@pytest.mark.parametrize("where", ["batches", "gradients"])
def test_data_that_the_task_refuses_while_training_fails_the_job_by_its_text(where: str) -> None:
    training = Training(leases=1)

    def refuse(*_: object) -> None:
        raise DataError("text.txt changed while it was read")

    setattr(training.task, where, refuse)
    with pytest.raises(JobFailure, match="the training failed: text.txt changed while it was read"):
        training.trainer.run()


def test_data_that_the_task_refuses_in_the_middle_of_a_lease_fails_the_job() -> None:
    training = Training(leases=1)
    batches = training.task.batches

    def break_off(split: str, examples: Sequence[int]) -> Iterator[tuple[int, int]]:
        yield next(batches(split, examples))
        raise DataError("text.txt ends too early")

    training.task.batches = break_off  # type: ignore[method-assign]
    with pytest.raises(JobFailure, match="ends too early"):
        training.trainer.run()
    assert len(training.task.seen) == 1


def test_a_fault_of_our_own_or_of_the_tasks_code_is_no_job_failure() -> None:
    fault = Training(leases=1)
    fault.source.is_wanted = lambda: int("no number") > 0  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no number"):
        fault.trainer.run()
    bug = Training(leases=1)
    bug.task.on_gradients = lambda: {}["missing"]
    with pytest.raises(KeyError):
        bug.trainer.run()


def test_data_that_the_task_refuses_while_evaluating_fails_the_job_and_our_own_fault_does_not() -> None:
    task, lease = CountingTask(), Lease(1, "evaluate", examples=(0,), split="valid")

    def refuse(batch: object) -> None:
        raise DataError("no such example")

    def fault() -> None:
        int("no number")

    with pytest.raises(ValueError, match="no number"):
        evaluate(task, lease, fault)
    task.evaluate = refuse  # type: ignore[method-assign, assignment]
    with pytest.raises(JobFailure, match="the evaluation failed: no such example"):
        evaluate(task, lease, lambda: None)


def test_gradients_are_clipped_by_their_joint_norm() -> None:
    training = Training(leases=1, clip=1.0, overlap=False)
    training.task.batches_a_lease = 1
    training.trainer.run()
    moved = np.concatenate([training.rig.weights(block) for block in range(3)])
    assert math.isclose(float(np.linalg.norm(moved)), 1.0, rel_tol=1e-5)


def test_clip_agrees_with_torch_and_leaves_small_gradients_alone() -> None:
    ours = {"a": torch.randn(50, generator=torch.Generator().manual_seed(1)), "b": torch.ones(3, 4)}
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in ours.values()]
    for parameter, gradient in zip(parameters, ours.values(), strict=True):
        parameter.grad = gradient.clone()
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, 2.0))
    assert math.isclose(global_norm(ours), norm, rel_tol=1e-6)
    clip_(ours, norm, 2.0)
    for parameter, gradient in zip(parameters, ours.values(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    before = {name: gradient.clone() for name, gradient in ours.items()}
    clip_(ours, global_norm(ours), 5.0)
    assert all(torch.equal(ours[name], before[name]) for name in ours)


def test_norm_of_huge_finite_gradients_is_finite() -> None:
    assert math.isclose(global_norm({"a": torch.full((4,), 1e30)}), 2e30, rel_tol=1e-6)
    assert not math.isfinite(global_norm({"a": torch.tensor([1.0, math.nan])}))


def test_lease_in_the_middle_is_reported_as_far_as_it_went_when_the_stage_ends() -> None:
    training = Training(leases=2)
    training.task.on_gradients = lambda: setattr(training.source, "wanted", len(training.task.seen) < 1)
    training.trainer.run()
    assert [(result.number, result.steps) for result in training.source.results] == [(1, 1)]
    assert training.rig.updates() == len(SHAPES)
    assert training.rig.counters.finished_examples == 0


def test_lease_in_the_middle_is_not_reported_when_the_process_leaves() -> None:
    training = Training(leases=2)
    training.task.on_gradients = lambda: setattr(training.source, "leaving", True)
    training.trainer.run()
    assert training.source.results == []
    assert training.rig.updates() == len(SHAPES)


def test_weights_are_fresh_after_a_wait_for_a_lease() -> None:
    training = Training(leases=1)
    other = training.rig.connect("w1", Replica(CountingTask().parameters()))

    def others_go_on() -> None:
        if training.source.results and len(training.task.seen) == 2:
            gradients = {name: torch.full(shape, 10.0) for name, shape in SHAPES.items()}
            other.begin(gradients, np.zeros(3, np.int64), 1)
            other.settle()
            training.source.leases = [Lease(2, "train", examples=(2,))]
        else:
            training.source.wanted = False

    training.source.wait_lease = others_go_on  # type: ignore[method-assign]
    training.trainer.run()
    assert training.task.seen == [0.0, 0.0, -12.0, -12.0]
