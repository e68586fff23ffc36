"""The control thread: a worker's membership, on a transport and a channel of its own.

It beats while the main thread computes, so that a long step is no death. Whatever ends it unexpectedly
ends the process: the main thread finds the failure at the desk.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from time import monotonic

from paramserver.process import log
from paramserver.protocol.membership import Membership, MembershipError
from paramserver.protocol.messages import CheckpointStored, ExportStored, KeptState, Register
from paramserver.protocol.transport import Channel, Malformed, Received, Transport
from worker.desk import Desk
from worker.errors import WorkerError

LOOK_SECONDS = 0.05  # how late a change at the desk may be told
IDLE_LOOK_SECONDS = 0.5  # without a job nothing changes at the desk
EXPORT_AGAIN_SECONDS = 2.0  # without an answer, the part is sent again


class ControlLoop:
    """One round of control at a time. It belongs to the thread that calls `step`.

    Args:
        channel: to the coordinator; owned from now on.
        clock: seconds, monotonic.
    """

    def __init__(self, channel: Channel, name: str, desk: Desk, clock: Callable[[], float] = monotonic) -> None:
        introduction = Register(role="worker", name=name, pid=os.getpid(), host=socket.gethostname())
        self.membership = Membership(introduction, desk.report)
        self._channel = channel
        self._name = name
        self._desk = desk
        self._clock = clock
        self._part_due = 0.0

    def step(self, timeout_seconds: float = LOOK_SECONDS) -> None:
        """Send what is due, wait at most so long for an answer, and take in what has come.

        Raises WorkerError when the coordinator refuses this process for good.
        """
        now = self._clock()
        if self._desk.take_urgent():
            self.membership.beat_soon()
        message = self.membership.due(now)
        if self.membership.must_reset:
            log(
                "coordinator-unreachable", level="warning", address=self._channel.address, action="going on with leases"
            )
            self._channel.reset()
            self.membership.must_reset = False
        if message is not None:
            self._channel.send(message)
        if self.membership.is_registered:
            if now >= self._part_due:
                self._send_part(now)
            self._run_errands(now)
        received = self._channel.receive(min(timeout_seconds, self.membership.seconds_to_next(now)))
        while received is not None:
            self._take(received)
            received = self._channel.receive(0)

    def _take(self, received: Received | Malformed) -> None:
        if isinstance(received, Malformed):
            log("malformed-answer", level="warning", reason=received.reason)
            return
        message = received.message
        now = self._clock()
        if isinstance(message, ExportStored) and self._desk.export_stored(message.job, message.lease, message.stored):
            self._send_part(now)
        if isinstance(message, CheckpointStored):
            self._desk.checkpoint_stored(message)
            self._run_errands(now)
        elif isinstance(message, KeptState):
            self._desk.state_came(message, received.frames[0])
            self._run_errands(now)
        try:
            orders = self.membership.hear(message, now)
        except MembershipError as error:
            raise WorkerError(str(error)) from None
        if orders is not None:
            self._desk.take_orders(orders, self.membership.incarnation)
        self._desk.heard()

    def _send_part(self, now: float) -> None:
        part = self._desk.next_part(self._name)
        if part is not None:
            message, frame = part
            self._channel.send(message, [frame])
            self._part_due = now + EXPORT_AGAIN_SECONDS

    def _run_errands(self, now: float) -> None:
        while (errand := self._desk.next_errand(self._name, now)) is not None:
            self._channel.send(*errand)


class ControlThread:
    """Runs a ControlLoop until `close`. The transport is made and used in its thread only.

    Args:
        key: the coordinator's public key, where the cluster uses keys.
    """

    def __init__(
        self, make_transport: Callable[[], Transport], address: str, name: str, desk: Desk, key: str = ""
    ) -> None:
        self._make_transport = make_transport
        self._address = address
        self._key = key
        self._name = name
        self._desk = desk
        self._must_end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_seconds: float = 2.0) -> None:
        """End the thread and wait for it."""
        self._must_end.set()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            transport = self._make_transport()
            try:
                loop = ControlLoop(transport.connect(self._address, self._key), self._name, self._desk)
                while not self._must_end.is_set():
                    loop.step(LOOK_SECONDS if self._desk.job is not None else IDLE_LOOK_SECONDS)
            finally:
                transport.close()
        except BaseException as failure:  # handed to the main thread, which raises it
            self._desk.fail(failure)
