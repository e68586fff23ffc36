"""The coordinator's loop, one round after another, on a clock that jumps."""

from __future__ import annotations

from pathlib import Path

import pytest

from paramserver.coordinator.runs import RunFolder
from paramserver.coordinator.server import CoordinatorServer
from paramserver.coordinator.store import Store
from paramserver.process import StopRequest
from paramserver.protocol.memory import MemoryNetwork
from paramserver.protocol.messages import Heartbeat, Register, WorkerReport

STOPPED_SECONDS = 30.0


@pytest.mark.parametrize("where", ["_handle_messages", "_run_commands"])
def test_a_process_that_was_stopped_in_the_middle_of_a_round_declares_nobody_dead(tmp_path: Path, where: str) -> None:
    network = MemoryNetwork(seed=1)
    store, now, stop = Store(tmp_path / "state"), [100.0], StopRequest()
    server = CoordinatorServer(network, network, "c:0", store, RunFolder(tmp_path / "runs"), clock=lambda: now[0])
    register = Register(role="worker", name="w")
    server.core.handle(b"peer", register, [], now[0])
    beat = Heartbeat(name="w", incarnation=1, seen=0, report=WorkerReport())
    server.core.handle(b"peer", beat, [], now[0])
    usual, rounds = getattr(server, where), [0]

    def stopped_in_between(*arguments: float) -> object:
        done = usual(*arguments)
        rounds[0] += 1
        now[0] += STOPPED_SECONDS if rounds[0] == 2 else 0.3
        if rounds[0] == 8:
            stop.set("the test is over")
        return done

    setattr(server, where, stopped_in_between)
    server.run(stop)
    assert [session.name for session in server.core.sessions.all()] == ["w"]
    store.close()
