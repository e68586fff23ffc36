"""The worker process: follows its orders, one job after another, one stage after another.

The main thread computes and exchanges; the control thread (control.py) beats. What was acknowledged is
never lost when this process is asked to stop: it finishes its step, flushes, hands back, and ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from pathlib import Path

from models.task import Task
from paramserver.account import Account
from paramserver.job import Job
from paramserver.process import StopRequest, log
from paramserver.protocol.messages import Lease, LeaseDone
from paramserver.protocol.transport import Transport
from worker import stages
from worker.checkpoint import CheckpointStop, adopt
from worker.client import Identity
from worker.desk import Desk, JobState, Upload
from worker.errors import Abandoned, JobFailure
from worker.exchange import Codec, Exchange
from worker.local_optimizer import LocalOptimizer
from worker.replica import Replica
from worker.train import Trainer

IDLE_SECONDS = 0.5  # how late a stop request may be seen
STOP_SECONDS = 4.0  # how long a stopping worker waits for shards
GOODBYE_SECONDS = 1.0  # and then for the coordinator
ADOPTION_SECONDS = 120.0  # a coordinator may be started again meanwhile

# What `push.overlap` means to the Trainer. An exchange in flight is one more step of staleness, which costs more
# than it saves where the exchange is short beside the computation.
PATIENCE: dict[str | bool, float] = {"auto": 0.5, True: 0.0, False: inf}


class Runner:
    """Runs orders until it is told to stop. Belongs to the main thread.

    Args:
        transport: for the shards; not the control thread's.
        name: of this worker.
        accounts: a folder in which acknowledged updates are noted; None for no account.
    """

    def __init__(
        self, transport: Transport, name: str, desk: Desk, stop: StopRequest, accounts: Path | None = None
    ) -> None:
        self._transport = transport
        self._name = name
        self._desk = desk
        self._stop = stop
        self._accounts = accounts
        self._known: tuple[str, int] | None = None  # the last job that pushed, and under which incarnation

    def run(self) -> None:
        """Raises WorkerError, and whatever ended the control thread."""
        while not self._must_stop():
            state = self._desk.job
            if state is None:
                self._desk.wait(lambda: self._desk.job is not None or self._desk.is_shut_down, IDLE_SECONDS)
                continue
            self._take_up(state)
        self._desk.leave()
        if self._desk.job is not None:
            self._desk.wait_reported(GOODBYE_SECONDS)

    def _must_stop(self) -> bool:
        return self._stop.is_set() or self._desk.is_shut_down

    def _take_up(self, state: JobState) -> None:
        """One job, until it is over, taken away, or this process stops."""
        log("job-taken", job=state.order.job, stage=state.order.stage)
        key = (state.order.job, state.incarnation)
        work = JobWork(
            self._transport, self._name, self._desk, state, self._must_stop, key == self._known, self._accounts
        )
        try:
            work.run()
        except Abandoned as why:
            log("job-dropped", job=state.order.job, reason=why)
        except JobFailure as failure:
            log("job-failed", level="error", job=state.order.job, reason=failure)
            self._desk.fail_job(state, str(failure))
        finally:
            if work.has_connected:
                self._known = key
            work.close()
        while self._desk.job is state and not self._must_stop():
            self._desk.wait(lambda: self._desk.job is not state, IDLE_SECONDS)


class JobWork:
    """Everything that a worker holds for one job. It is the Trainer's LeaseSource.

    Args:
        is_resumed: this process has pushed for the job before, under the same incarnation.
        accounts: see `Runner`.
    """

    def __init__(
        self,
        transport: Transport,
        name: str,
        desk: Desk,
        state: JobState,
        must_stop: Callable[[], bool],
        is_resumed: bool = False,
        accounts: Path | None = None,
    ) -> None:
        self._transport = transport
        self._name = name
        self._desk = desk
        self._state = state
        self._must_stop = must_stop
        self._is_resumed = is_resumed
        self._stop_at: float | None = None
        self._job = Job.model_validate_json(state.order.specification)
        self._accounts = accounts
        self._account: Account | None = None
        self._exchange: Exchange | None = None
        self._optimizer: LocalOptimizer | None = None
        self._stop: CheckpointStop | None = None
        self._has_adopted = False
        self._task: Task
        self._replica: Replica

    def run(self) -> None:
        """Follow the stages of the order. Raises Abandoned when it is over, JobFailure when it cannot go on."""
        self._task = stages.build_task(self._job, self._state.counters)
        try:
            self._replica = Replica(self._task.parameters())
        except ValueError as error:
            raise JobFailure(f"the model cannot be cut into blocks: {error}") from error
        self._enter("idle")
        run_stage = {
            "initialise": self._initialise,
            "train": self._train,
            "drain": self._drain,
            "evaluate": self._evaluate,
            "export": self._export,
        }
        while not self._must_stop():
            self._guard()
            order = self._state.order
            if self._exchange is not None:
                self._exchange.follow(order.placement)
            run_stage[order.stage]()
        if self._exchange is not None and self._state.order.stage in ("train", "drain"):
            self._drain()

    @property
    def has_connected(self) -> bool:
        """Whether the shards may have heard of this worker."""
        return self._exchange is not None

    def close(self) -> None:
        if self._exchange is not None:
            self._exchange.close()
        if self._account is not None:
            self._account.close()

    # ------------------------------------------------------------------- the stages

    def _initialise(self) -> None:
        lease = self._begin("initialise")
        if lease is None:
            return
        examples = stages.count_examples(self._task)

        def declare() -> None:
            self._state.layout = self._replica.layout
            self._state.examples = examples

        self._desk.update(self._state, declare)
        while not self._state.order.placement:
            self._guard()
            if self._must_stop():
                return
            self._wait_change(lambda: bool(self._state.order.placement))
        self._connect().initialise()
        self._desk.finish_lease(self._state, LeaseDone(number=lease.number))

    def _train(self) -> None:
        if not self._state.order.placement:
            self._wait_change(lambda: bool(self._state.order.placement))
            return
        exchange = self._connect()
        self._adopt(exchange)
        exchange.pull(self._state.counters.steps)
        self._enter("train")
        settings = self._job
        clip, patience = settings.optimizer.clip, PATIENCE[settings.push.overlap]
        counters, optimizer = self._state.counters, self._local_optimizer()
        self._stop = CheckpointStop(self._desk, self._state, exchange, optimizer, self._look)
        Trainer(self._task, self._replica, exchange, self, counters, clip, patience, optimizer, stop=self._stop).run()

    def _adopt(self, exchange: Exchange) -> None:
        """Go on with the state that a checkpoint keeps of this worker's predecessor, where there is one."""
        if self._has_adopted or self._is_resumed or not self._state.order.resumes:
            return
        self._has_adopted = True
        taking = self._desk.take_state(self._state)
        deadline = time.monotonic() + ADOPTION_SECONDS
        while not taking.is_complete:
            self._guard_stop()
            if time.monotonic() > deadline:
                raise JobFailure(
                    f"the state that the checkpoint keeps of this worker's predecessor did not come within "
                    f"{ADOPTION_SECONDS:.0f} s; see whether the coordinator lives, then submit the job again"
                )
            self._wait_change(lambda: taking.is_complete)
        if taking.data:
            adopt(bytes(taking.data), self._state.adopted, exchange, self._local_optimizer())

    def _drain(self) -> None:
        if not self._state.drained:
            if self._exchange is not None:
                stages.drain(self._exchange, self._state.counters, is_last=self._state.order.stage == "drain")
            self._enter("drain")

            def drained() -> None:
                self._state.drained = True

            self._desk.update(self._state, drained)
        self._wait_change(lambda: self._state.order.stage != "drain")

    def _evaluate(self) -> None:
        self._enter("evaluate")
        held = ""
        while self._is_stage("evaluate"):
            lease = self._begin("evaluate")
            if lease is None:
                continue
            if held != lease.source:
                self._connect().pull(self._state.counters.steps, lease.source)
                held = lease.source
            self._desk.finish_lease(self._state, stages.evaluate(self._task, lease, self._guard_stop))

    def _export(self) -> None:
        lease = self._begin("export")
        if lease is None:
            return
        self._enter("export")
        self._connect().pull(self._state.counters.steps, "weights")
        upload = Upload(lease.number, memoryview(stages.export_bytes(self._task)))

        def offer() -> None:
            self._state.upload = upload

        self._desk.update(self._state, offer)
        while not upload.is_complete:
            self._guard_stop()
            self._wait_change(lambda: upload.is_complete)
        self._desk.finish_lease(self._state, LeaseDone(number=lease.number))

    # -------------------------------------------------------- leases (see LeaseSource)

    def is_wanted(self) -> bool:
        return self._is_stage("train")

    def is_leaving(self) -> bool:
        return self._must_stop()

    def next_lease(self) -> Lease | None:
        return self._desk.begin_lease(self._state, "train")

    def wait_lease(self) -> None:
        leases = self._state.leases
        stop = self._stop
        self._wait_change(
            lambda: (
                leases.waiting("train") > 0
                or self._state.order.stage != "train"
                or (stop is not None and stop.is_due(is_between_leases=True))
            )
        )

    def finish(self, result: LeaseDone) -> None:
        self._desk.finish_lease(self._state, result)

    # ----------------------------------------------------------------------- helpers

    def _local_optimizer(self) -> LocalOptimizer | None:
        """This worker's own optimiser, made once and kept over all its leases; None where the shards have it."""
        settings = self._job.optimizer
        if settings.where == "worker" and self._optimizer is None:
            self._optimizer = LocalOptimizer(settings, self._task.parameters())
        return self._optimizer

    def _connect(self) -> Exchange:
        """The exchange with the shards of the order's placement, made once."""
        if self._exchange is not None:
            return self._exchange
        order, layout = self._state.order, self._replica.layout
        if order.layout is None or order.layout.fingerprint != layout.fingerprint:
            found = order.layout.fingerprint if order.layout else "none"
            raise JobFailure(
                f"this worker builds a model of layout {layout.fingerprint}, the job's is {found}; "
                "install the same release and the same data on every worker"
            )
        push = self._job.push
        if self._accounts is not None:
            self._account = Account(self._accounts, order.job, self._name, self._state.incarnation)
        self._exchange = Exchange(
            self._transport,
            order.placement,
            Identity(order.job, self._name, self._state.incarnation, layout.fingerprint),
            self._replica,
            Codec(push.encodings(layout), push.deadline_seconds, push.error, push.error_limit, push.settling_updates),
            self._state.counters,
            self._guard,
            is_resumed=self._is_resumed,
            account=self._account,
        )
        return self._exchange

    def _begin(self, kind: str) -> Lease | None:
        """A lease of this kind, or None after a while."""
        lease = self._desk.begin_lease(self._state, kind)
        if lease is None:
            stage = self._state.order.stage
            self._wait_change(lambda: self._state.leases.waiting(kind) > 0 or self._state.order.stage != stage)
        return lease

    def _is_stage(self, stage: str) -> bool:
        self._guard()
        return self._state.order.stage == stage and not self._must_stop()

    def _enter(self, stage: str) -> None:
        if self._state.stage != stage:

            def enter() -> None:
                self._state.stage = stage

            self._desk.update(self._state, enter)

    def _wait_change(self, is_over: Callable[[], bool]) -> None:
        self._desk.wait(lambda: is_over() or self._desk.job is not self._state, IDLE_SECONDS)

    def _look(self) -> None:
        """Wait a little for another order, and raise where there is nothing to wait for any more."""
        self._guard()
        number = self._state.order.checkpoint
        self._wait_change(lambda: self._state.order.checkpoint != number)

    def _guard(self) -> None:
        """Raise where this job is not ours any more, or a stop has waited long enough for shards."""
        self._desk.check()
        if self._desk.job is not self._state:
            raise Abandoned("the coordinator orders another")
        order = self._state.order
        if self._exchange is not None:
            self._exchange.follow(order.placement)
        if self._must_stop():
            now = time.monotonic()
            self._stop_at = now + STOP_SECONDS if self._stop_at is None else self._stop_at
            if now >= self._stop_at:
                raise Abandoned("told to stop, and the shards did not answer in time")

    def _guard_stop(self) -> None:
        """As `_guard`; a stop is obeyed at once, where nothing would be lost."""
        self._guard()
        if self._must_stop():
            raise Abandoned("told to stop")
