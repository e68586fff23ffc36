"""Frames made and decoded on a parameter's device: the same bytes, residuals and replicas as on the host.

The whole device path runs here on CPU tensors, by a route that is forced. Tensors of the device "meta" have shapes
and no memory: whatever would read a value back to the host, where it must not, raises.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from worker_rig import SHAPES, Rig, make_parameters, total

from models.task import Parameter
from paramserver.encoding import EncodingOptions, make_encoding
from paramserver.encoding.tiled import kernels
from paramserver.protocol.buffers import BufferPool
from paramserver.protocol.layout import BLOCK_ELEMENTS
from paramserver.protocol.memory import MemoryNetwork
from paramserver.protocol.messages import Push, Pushed, RefusedUpdate
from paramserver.protocol.transport import Received
from paramserver.shard.core import Reply
from worker.encoder import UpdateEncoder
from worker.replica import CodecPath, Replica
from worker.residual import Residual, ResidualStore

ENCODINGS = ["fp32", "bf16", "int8", "int4", "fp4", "int2", "ternary", "sign", "topk"]
PATHS: tuple[CodecPath, ...] = ("device", "host")


def bits(values: Residual | None) -> bytes | None:
    """Zeros of different signs are different bits."""
    return None if values is None else np.asarray(values).tobytes()


def faulty() -> MemoryNetwork:
    return MemoryNetwork(seed=7, drop=0.15, duplicate=0.15, reorder=0.15, delay=(0.0, 0.05))


def assert_same(device: Rig, host: Rig) -> None:
    """Everything that either worker has sent and keeps is the same, bit for bit."""
    for one, other in zip(device.shards, host.shards, strict=True):
        assert one.heard == other.heard
    for block in host.layout.blocks:
        kept, expected = (rig.exchange.residuals.find(block.index) for rig in (device, host))
        assert bits(kept) == bits(expected)
        assert device.replica.values(block.index).tobytes() == host.replica.values(block.index).tobytes()
    assert device.replica.editions.tolist() == host.replica.editions.tolist()
    assert device.exchange.residuals.blocks() == host.exchange.residuals.blocks()
    assert device.exchange.residuals.norm() == pytest.approx(host.exchange.residuals.norm(), rel=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_frames_residuals_and_replicas_are_those_of_the_host_whatever_the_network_does(encoding: str) -> None:
    pull = {"encoding": encoding, "fresh": False}
    device, host = (Rig(encoding, faulty(), path=path, pull=pull) for path in PATHS)
    for rig in (device, host):
        rig.exchange.pull(0)
        for step in range(1, 16):
            rig.step(step, step)
        rig.exchange.pull(16)
        assert rig.network.faults.dropped
        assert rig.network.faults.duplicated
    assert_same(device, host)
    assert device.updates() == 15 * len(SHAPES)
    assert device.replica.editions.min() > 1
    if encoding != "fp32":
        assert isinstance(device.exchange.residuals.find(0), Tensor)
        assert isinstance(host.exchange.residuals.find(0), np.ndarray)


def test_no_compiled_kernel_encodes_what_the_device_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*arguments: object) -> None:
        raise AssertionError("encoded on the host")

    device, host = (Rig("int4", path=path) for path in PATHS)
    monkeypatch.setattr(kernels, "encode_int4", encode)
    device.step(1, 1)
    assert device.updates() == len(SHAPES)
    with pytest.raises(AssertionError, match="encoded on the host"):
        host.step(1, 1)


def refuse_first_push(rig: Rig) -> None:
    """The first shard refuses all of the first push, for good, and applies nothing of it."""
    shard = rig.shards[0]

    def refuse(received: Received) -> list[Reply] | None:
        message = received.message
        if not isinstance(message, Push) or len(shard.pushes()) > 1:
            return None
        refused = tuple(
            RefusedUpdate(update.block, update.sequence, "unknown-edition", "for the test")
            for update in message.updates
        )
        return [Reply(received.peer, Pushed(request=message.request, acknowledged=(), refused=refused))]

    shard.intercept = refuse


@pytest.mark.parametrize("encoding", ["fp32", "int8", "sign", "topk"])
def test_refused_update_goes_back_into_the_residual_of_the_device_and_out_with_the_next(encoding: str) -> None:
    device, host = (Rig(encoding, path=path) for path in PATHS)
    for rig in (device, host):
        refuse_first_push(rig)
        first = rig.step(1, 1)
        taken_back = np.asarray(rig.exchange.residuals.of(0))
        np.testing.assert_allclose(taken_back, first["first.weight"].numpy().ravel(), atol=1e-6)
    assert isinstance(device.exchange.residuals.of(0), Tensor)
    assert_same(device, host)
    for rig in (device, host):
        second = rig.step(2, 2)
        applied = -rig.weights(0) + np.asarray(rig.exchange.residuals.of(0))
        np.testing.assert_allclose(applied, total([first, second], "first.weight"), atol=1e-5)
    assert_same(device, host)


def test_update_that_is_not_finite_never_gets_into_a_residual_of_a_device() -> None:
    store = ResidualStore(Replica(make_parameters()).layout, {1: torch.device("cpu")})
    assert store.find(1) is None
    assert store.take_back(1, np.full(40, 3.0, np.float32))
    assert not store.take_back(1, np.full(40, np.nan, np.float32))
    assert not store.take_back(1, np.full(40, np.inf, np.float32))
    residual = store.of(1)
    assert isinstance(residual, Tensor)
    assert residual.eq(3).all()
    store.of(0)[0] = 4.0
    store.of(2)
    assert store.norm() == pytest.approx((9 * 40 + 16) ** 0.5)
    assert store.blocks() == [0, 1]
    store.clear(1)
    assert store.norm() == 4.0


@pytest.mark.parametrize("encoding", ["int8", "ternary", "topk"])
def test_flush_sends_the_residuals_of_a_device_at_full_precision(encoding: str) -> None:
    device, host = (Rig(encoding, faulty(), path=path) for path in PATHS)
    for rig in (device, host):
        gradients = [rig.step(step, step) for step in range(1, 6)]
        assert rig.exchange.residuals.norm() > 0
        rig.exchange.flush(6)
        assert rig.exchange.residuals.norm() == 0
        assert rig.exchange.residuals.blocks() == []
        for block in rig.layout.blocks:
            np.testing.assert_allclose(-rig.weights(block.index), total(gradients, block.parameter), atol=1e-5)
    assert {update.encoding for update in device.shards[0].pushes()[-1][0].updates} == {"fp32"}
    assert_same(device, host)


def test_weights_are_pulled_whole_onto_a_device_and_the_replica_comes_back_after_them() -> None:
    rig = Rig("int4", path="device", pull={"encoding": "sign", "publish_every": 100, "fresh": False})
    rig.exchange.pull(0)
    rig.step(1, 1)
    held = [rig.replica.values(block.index).copy() for block in rig.layout.blocks]
    rig.exchange.pull(1, "weights")
    for block in rig.layout.blocks:
        np.testing.assert_array_equal(rig.replica.values(block.index), rig.weights(block.index))
        assert not np.array_equal(held[block.index], rig.weights(block.index))
    rig.exchange.pull(1)
    for block in rig.layout.blocks:
        np.testing.assert_array_equal(rig.replica.values(block.index), held[block.index])


# ------------------------------------------------------------------ what a device cannot encode


@pytest.mark.parametrize(
    ("encoding", "push", "reason"),
    [
        ("adaptive", {}, "encoding 'adaptive/64' has no torch member"),
        ("int4", {"rounding": "stochastic"}, "int4/64 with rounding 'stochastic' is encoded on the host only"),
    ],
)
def test_what_a_device_cannot_encode_goes_through_the_host_as_ever_and_one_event_says_so(
    encoding: str, push: dict[str, object], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Rig(encoding, faulty(), path="host", push=push)
    assert "through-host" not in capsys.readouterr().err
    device = Rig(encoding, faulty(), path="device", push=push)
    for rig in (device, host):
        for step in range(1, 9):
            rig.step(step, step)
    assert_same(device, host)
    events = [line for line in capsys.readouterr().err.splitlines() if "through-host" in line]
    assert len(events) == 1
    assert 'event=pushed-through-host parameters="first.weight, second.weight" device=cpu' in events[0]
    assert reason in events[0]
    assert isinstance(device.exchange.residuals.of(0), np.ndarray)
    assert isinstance(device.exchange.residuals.of(1), Tensor), "the bias goes at full precision, from the device"


def test_a_delta_that_no_device_decodes_goes_through_the_host_and_one_event_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pull = {"encoding": "coded", "fresh": False}
    device, host = (Rig("int4", faulty(), path=path, pull=pull) for path in PATHS)
    for rig in (device, host):
        rig.exchange.pull(0)
        for step in range(1, 9):
            rig.step(step, step)
    assert_same(device, host)
    assert device.replica.editions.min() > 1
    events = [line for line in capsys.readouterr().err.splitlines() if "through-host" in line]
    assert len(events) == 1
    assert "event=pulled-through-host encoding=coded device=cpu" in events[0]
    assert "encoding 'coded' has no torch member" in events[0]


# ----------------------------------------------------------------------- tensors of every kind


def strided() -> list[Parameter]:
    """None of them is contiguous; the second one's blocks are views with gaps."""
    return [
        Parameter("a", torch.zeros(40, 70).t(), "g"),
        Parameter("b", torch.zeros(300)[::3], "g"),
        Parameter("c", torch.zeros(20, 8, 4)[:, :3], "g"),
    ]


@pytest.mark.parametrize("path", ["device", "host"])
@pytest.mark.parametrize("encoding", ["int4", "coded"])
def test_strided_parameters_are_written_and_added_to_where_they_are(path: CodecPath, encoding: str) -> None:
    parameters = strided()
    replica = Replica(parameters, path)
    member, fp32 = make_encoding(encoding), make_encoding("fp32")
    generator = np.random.default_rng(0)
    for block in replica.layout.blocks:
        snapshot = generator.standard_normal(block.elements).astype(np.float32)
        whole = np.empty(fp32.frame_bytes(block.elements), np.uint8)
        fp32.encode(snapshot, whole)
        assert replica.write(block.index, 4, "fp32", whole)
        deltas = []
        for _ in range(2):
            frame = np.empty(member.frame_bytes(block.elements), np.uint8)
            size = member.encode(generator.standard_normal(block.elements).astype(np.float32), frame)
            deltas.append(frame[:size])
            member.decode_add(frame[:size], snapshot)
        assert replica.apply_deltas(block.index, 6, member.identifier, deltas)
        assert replica.values(block.index).tobytes() == snapshot.tobytes()
        live = next(one.tensor for one in parameters if one.name == block.parameter)
        assert live.reshape(-1).numpy().tobytes() == snapshot.tobytes()
        assert np.array_equal(replica.editions[: block.index + 1], [6] * (block.index + 1))


def test_parameter_larger_than_a_block_is_encoded_block_by_block_from_any_gradient() -> None:
    """Gradients of another type, or strided, become flat float32 on the device as they do on the host."""
    elements = 2 * BLOCK_ELEMENTS + 10
    gradient = torch.randn(2, elements, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[0:1].t()
    frames = []
    for path in PATHS:
        replica = Replica([Parameter("w", torch.zeros(elements, 1), "g")], path)
        encodings = [make_encoding("int4", EncodingOptions(tile=2048))] * 3
        encoder = UpdateEncoder(replica.layout, encodings, BufferPool(), 0.6, replica.devices)
        views = replica.gradients({"w": gradient})
        assert 0 in views
        frames.append([bytes(encoder.encode(block, views, None)) for block in (2, 0, 1)])
        frames[-1] += [bytes(encoder.encode_residual(block, None)) for block in (0, 1, 2)]
    assert frames[0] == frames[1]
    assert len({len(frame) for frame in frames[0]}) == 4


def test_gradients_stay_on_the_device_and_the_host_is_asked_for_only_where_it_encodes() -> None:
    replica = Replica([Parameter("w", torch.empty(70, device="meta"), "g")])
    gradients = replica.gradients({"w": torch.empty(70, device="meta", dtype=torch.bfloat16)})
    assert 0 in gradients
    assert gradients.on_device(0).device.type == "meta"
    assert gradients.on_device(0).dtype == torch.float32
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        gradients[0]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_parameter_off_the_cpu_is_encoded_there_and_nothing_but_its_frame_is_read_back(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elements = 3000
    replica = Replica([Parameter("w", torch.empty(elements, device="meta"), "g")])
    assert replica.devices == {0: torch.device("meta")}
    member = make_encoding(encoding)
    encoder = UpdateEncoder(replica.layout, [member], BufferPool(), 0.6, replica.devices)
    fetched = []

    def fetch(encoded: Tensor, memory: object) -> np.ndarray:
        fetched.append((encoded.device.type, encoded.dtype, encoded.numel()))
        return np.zeros(encoded.numel(), np.uint8)

    monkeypatch.setattr(encoder, "_fetch", fetch)
    gradients = replica.gradients({"w": torch.empty(elements, device="meta")})
    encoder.plan(gradients)
    assert encoder.sends(0)
    encoder.encode(0, gradients, None)
    assert fetched == [("meta", torch.uint8, member.frame_bytes(elements))]
    residual = encoder.residuals.of(0)
    assert isinstance(residual, Tensor)
    assert residual.device.type == "meta"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_snapshots_and_deltas_reach_a_parameter_off_the_cpu_as_bytes_and_nothing_is_read_back(encoding: str) -> None:
    replica = Replica([Parameter("w", torch.empty(60, 50, device="meta"), "g")])
    member = make_encoding(encoding)
    frame = np.empty(member.frame_bytes(3000), np.uint8)
    member.encode(np.ones(3000, np.float32), frame)
    frame.flags.writeable = False  # as those that a transport has received
    assert replica.write(0, 3, member.identifier, frame)
    assert replica.apply_deltas(0, 5, member.identifier, [frame, frame])
    assert replica.editions.tolist() == [5]


def test_parameters_on_the_cpu_keep_the_compiled_members() -> None:
    rig = Rig("int4")
    assert not rig.replica.devices
    rig.step(1, 1)
    assert all(isinstance(rig.exchange.residuals.of(block.index), np.ndarray) for block in rig.layout.blocks)
    parameters = make_parameters()
    assert np.shares_memory(Replica(parameters).values(0), parameters[0].tensor.numpy())
