"""A shard that compiles for a new job goes on beating: cold kernels take longer than a session lasts."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest

from paramserver.job import Job
from paramserver.process import StopRequest
from paramserver.protocol.layout import Parameter, cut_layout
from paramserver.protocol.messages import Heartbeat, Orders, PartOrder, Register, Registered, ShardOrder, ShardReport
from paramserver.protocol.transport import Listener, Received
from paramserver.protocol.zeromq import ZeroMQTransport
from paramserver.shard import server as server_module
from paramserver.shard.preparation import Preparation
from paramserver.shard.server import ShardServer
from paramserver.shard.serving import prepare

SPECIFICATION = json.dumps({"name": "job", "model": {"family": "recurrent"}})
LAYOUT = cut_layout([Parameter("a", (8,), "first")])


def order(job: str = "job", term: int = 1) -> PartOrder:
    return PartOrder(
        part="shard-0", job=job, specification=SPECIFICATION, term=term, phase=0, layout=LAYOUT, blocks=(0,)
    )


def reports(listener: Listener, seconds: float = 30.0) -> Any:
    """The shard's reports, as a coordinator hears them; it answers the first words of the shard with an order."""
    deadline = monotonic() + seconds
    while monotonic() < deadline:
        received = listener.receive(0.2)
        if not isinstance(received, Received):
            continue
        if isinstance(received.message, Register):
            registered = Registered(incarnation=1, heartbeat_seconds=0.02, session_seconds=3.0)
            listener.send(received.peer, registered)
        elif isinstance(received.message, Heartbeat):
            listener.send(received.peer, Orders(number=1, order=ShardOrder((order(),))))
            assert isinstance(received.message.report, ShardReport)
            yield received.message
    pytest.fail("the shard fell silent")


def test_a_shard_beats_while_it_compiles_and_then_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    is_compiling, may_end = threading.Event(), threading.Event()

    def slow(job: Job) -> None:
        is_compiling.set()
        assert may_end.wait(30)

    monkeypatch.setattr(server_module, "Preparation", lambda order, home: Preparation(order, home, slow))
    transport, own, stop = ZeroMQTransport(), ZeroMQTransport(), StopRequest()
    coordinator = transport.listen("tcp://127.0.0.1:0")
    introduction = Register(role="shard", name="shard-0")
    shard = ShardServer(own, "tcp://127.0.0.1:0", coordinator.address, introduction)
    thread = threading.Thread(target=shard.run, args=(stop,))
    thread.start()
    try:
        heard = reports(coordinator)
        assert next(beat for beat in heard if is_compiling.is_set()).report.parts == ()
        for _ in range(10):
            beat = next(heard)
            assert beat.report.parts == (), "it may not say that it serves what it cannot serve yet"
        assert beat.seen == 1
        may_end.set()
        assert next(beat for beat in heard if beat.report.parts).report.parts[0].blocks == 1
    finally:
        may_end.set()
        stop.set("the test is over")
        thread.join(30)
        own.close()
        coordinator.close()
        transport.close()
    assert not thread.is_alive()


def _end(preparation: Preparation, poll: Callable[..., Any]) -> None:
    poll("the preparation to end", preparation.is_over, 20)


def test_what_fails_while_compiling_is_raised_in_the_loop(poll: Callable[..., Any]) -> None:
    def broken(job: Job) -> None:
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        _end(Preparation(order(), compile_for=broken), poll)


def test_a_preparation_compiles_for_the_job_of_its_order(poll: Callable[..., Any]) -> None:
    compiled: list[str] = []
    _end(Preparation(order(), compile_for=lambda job: compiled.append(job.name)), poll)
    assert compiled == ["job"]


def test_a_job_of_stochastic_pushes_is_prepared_with_its_layers_and_its_pulls() -> None:
    # Neither fp32, which norms and biases have, nor ternary can round so.
    push = {"encoding": "int8", "rounding": "stochastic"}
    prepare(Job.model_validate({"name": "job", "model": {"family": "recurrent"}, "push": push}))


def test_preparing_compiles_what_publishing_calls_and_no_encoder_of_pulls() -> None:
    # A process of its own: in this one, other tests have compiled everything.
    script = """
from paramserver.job import Job
from paramserver.shard.serving import prepare
from paramserver.encoding import kernels as family
from paramserver.encoding.coded import kernels as coded
from paramserver.encoding.tiled import kernels as tiled

for pull in ("ternary", "coded"):
    ways = {"push": {"encoding": "int4"}, "pull": {"encoding": pull}}
    prepare(Job.model_validate({"name": "job", "model": {"family": "recurrent"}, **ways}))
ready = [family.delta_fp32, tiled.delta_ternary, coded.quantise_delta, family.decode]
assert all(kernel.signatures for kernel in ready), ready
assert not tiled.encode_ternary.signatures
assert not tiled.delta_int4.signatures
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
