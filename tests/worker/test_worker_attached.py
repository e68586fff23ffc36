"""A script's own model on shards: one that serves several parts, and one that lets in only whom it knows."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from worker_rig import SHAPES, make_gradients, make_parameters

from paramserver.job import PushSettings
from paramserver.process import StopRequest
from paramserver.protocol.keys import load_keys, make_keys
from paramserver.protocol.memory import MemoryNetwork
from paramserver.protocol.messages import PartAddress, PartOrder, Register, WorkerKey
from paramserver.protocol.zeromq import ZeroMQTransport
from paramserver.shard.core import ShardCore
from paramserver.shard.server import ShardServer
from worker.attached import attach
from worker.replica import Replica

LAYOUT = Replica(make_parameters()).layout
PARTS = {"shard-0": (0, 2), "shard-1": (1,)}
SPECIFICATION = json.dumps(
    {
        "name": "job",
        "model": {"family": "recurrent"},
        "optimizer": {"name": "sgd", "lr": 1.0},
        "push": {"encoding": "fp32"},
        "pull": {"encoding": "fp32"},
    }
)
Serve = Callable[..., list[PartAddress]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """serve(keys=None): one shard in a thread that serves both parts; their addresses."""
    stop = StopRequest()
    threads: list[threading.Thread] = []

    def start(keys: Path | None = None) -> list[PartAddress]:
        own = None if keys is None else load_keys(keys, "shard-0")
        known = () if keys is None else (WorkerKey("mine", 1, load_keys(keys, "mine").own.public),)
        ready, bound = threading.Event(), list[str]()

        def run() -> None:
            transport = ZeroMQTransport(own)
            register = Register(role="shard", name="shard-0")
            coordinator_key = "" if own is None else own.coordinator
            server = ShardServer(
                transport, "tcp://127.0.0.1:0", "tcp://127.0.0.1:9", register, coordinator_key=coordinator_key
            )
            for name, blocks in PARTS.items():
                core = ShardCore(name)
                core.take_order(
                    PartOrder(
                        part=name,
                        job="job",
                        specification=SPECIFICATION,
                        term=3,
                        phase=0,
                        layout=LAYOUT,
                        blocks=blocks,
                        workers=known,
                    )
                )
                server.hold(core)
            bound.append(server.address)
            ready.set()
            server.run(stop)
            transport.close()

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        assert ready.wait(60)
        key = "" if own is None else own.own.public
        return [PartAddress(name, bound[0], blocks, 1, key) for name, blocks in PARTS.items()]

    yield start
    stop.set("the test is over")
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def train(shards: list[PartAddress], keys: Path | None = None) -> None:
    """Two steps of SGD at lr 1 from zero; the model is minus the sum of the gradients."""
    parameters = make_parameters()
    gradients = [make_gradients(1), make_gradients(2)]
    settings = PushSettings(encoding="fp32")
    with attach(parameters, shards, job="job", worker="mine", incarnation=1, push=settings, keys=keys) as attached:
        attached.initialise()
        attached.pull()
        for step in gradients:
            attached.push(step)
    for parameter in parameters:
        wanted = -(gradients[0][parameter.name] + gradients[1][parameter.name])
        torch.testing.assert_close(parameter.tensor, wanted)
    assert len(parameters) == len(SHAPES)


def test_one_shard_may_serve_several_parts_under_a_newer_term_than_the_script_knows(serve: Serve) -> None:
    train(serve())


def test_a_script_with_a_key_trains_on_shards_that_let_in_only_whom_they_know(serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    for name in ("coordinator", "shard-0", "mine"):
        make_keys(keys, name)
    train(serve(keys), keys)


def test_keys_and_a_transport_of_ones_own_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either keys or a transport"):
        attach(make_parameters(), [], job="job", worker="mine", keys=tmp_path, transport=MemoryNetwork(seed=1))
