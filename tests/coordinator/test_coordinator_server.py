"""The coordinator's loop, one round after another, on a clock that jumps."""

from __future__ import annotations

from pathlib import Path

import pytest

from paramserver.coordinator.runs import RunFolder
from paramserver.coordinator.server import CoordinatorServer
from paramserver.coordinator.store import Store
from paramserver.job import Job
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


def test_a_job_that_is_submitted_again_under_its_key_is_queued_once_also_by_a_successor(tmp_path: Path) -> None:
    """A client whose answer was lost cannot know whether the job was queued."""
    job = Job.model_validate({"name": "job", "model": {"family": "recurrent", "args": {"task": "char-lm"}}})

    def server(name: str) -> tuple[CoordinatorServer, Store]:
        network, store = MemoryNetwork(seed=1), Store(tmp_path / "state")
        return CoordinatorServer(network, network, name, store, RunFolder(tmp_path / "runs")), store

    first, store = server("c:0")
    answer = first.submit(job, key="one")
    assert first.submit(job, key="one") == answer
    assert first.submit(job, key="two")[0] == "job-2"
    assert first.submit(job)[0] == "job-3"
    store.close()
    second, store = server("c:1")
    assert second.submit(job, key="one") == answer
    assert second.submit(job, key="three")[0] == "job-4"
    assert [record.id for record in second.core.queue()] == ["job", "job-2", "job-3", "job-4"]
    store.close()
