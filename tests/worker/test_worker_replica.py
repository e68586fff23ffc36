"""The replica writes into live memory; devices and residuals keep their promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from worker_rig import make_parameters

from models.task import Parameter
from paramserver.encoding import EncodingError, make_encoding
from paramserver.protocol.buffers import BufferPool
from paramserver.protocol.layout import BLOCK_ELEMENTS
from paramserver.protocol.transport import SENT
from worker.device import choose_device
from worker.errors import JobFailure
from worker.replica import Replica
from worker.residual import ResidualStore


def encoded(values: np.ndarray, name: str = "fp32") -> np.ndarray:
    encoding = make_encoding(name)
    frame = np.empty(encoding.frame_bytes(values.size), np.uint8)
    encoding.encode(values.astype(np.float32), frame)
    return frame


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_written_values_are_in_the_live_tensor(name: str) -> None:
    parameters = make_parameters()
    replica = Replica(parameters)
    values = np.arange(128, dtype=np.float32)
    assert replica.write(0, 5, name, encoded(values, name))
    np.testing.assert_array_equal(parameters[0].tensor.numpy().ravel(), values)
    assert replica.editions.tolist() == [5, -1, -1]


def test_older_edition_never_overwrites_a_newer_one() -> None:
    parameters = make_parameters()
    replica = Replica(parameters)
    replica.write(1, 5, "fp32", encoded(np.ones(40)))
    assert not replica.write(1, 4, "fp32", encoded(np.zeros(40)))
    assert parameters[1].tensor.eq(1).all()


def test_parameter_larger_than_a_block_is_written_block_by_block() -> None:
    tensor = torch.zeros(BLOCK_ELEMENTS + 10)
    replica = Replica([Parameter("w", tensor, "g")])
    replica.write(1, 1, "fp32", encoded(np.ones(10)))
    assert tensor[:BLOCK_ELEMENTS].eq(0).all()
    assert tensor[BLOCK_ELEMENTS:].eq(1).all()


def test_tensor_that_is_not_contiguous_is_written_through_a_copy() -> None:
    tensor = torch.zeros(4, 3).t()
    replica = Replica([Parameter("w", tensor, "g")])
    values = np.arange(12, dtype=np.float32)
    replica.write(0, 1, "fp32", encoded(values))
    np.testing.assert_array_equal(tensor.reshape(-1).numpy(), values)
    np.testing.assert_array_equal(replica.values(0), values)


def test_frame_that_is_none_of_the_block_changes_nothing() -> None:
    parameters = make_parameters(7.0)
    replica = Replica(parameters)
    with pytest.raises(EncodingError):
        replica.write(0, 1, "fp32", encoded(np.ones(3)))
    assert parameters[0].tensor.eq(7).all()
    assert replica.editions[0] == -1


def test_gradient_blocks_are_views_of_the_gradient() -> None:
    replica = Replica(make_parameters())
    gradient = torch.zeros(8, 16)
    view = replica.gradients({"first.weight": gradient})[0]
    gradient += 1
    assert (view == 1).all()


def test_parameter_of_another_type_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"parameter 'w' is torch.float64"):
        Replica([Parameter("w", torch.zeros(2, dtype=torch.float64), "g")])


def test_absent_cuda_is_one_clear_message() -> None:
    assert choose_device("cpu").type == "cpu"
    if torch.cuda.is_available():
        assert choose_device("auto").type == "cuda"
        return
    assert choose_device("auto").type == "cpu"
    with pytest.raises(JobFailure, match="finds 0 CUDA devices; use device: auto or cpu"):
        choose_device("cuda:1")


def test_residual_takes_back_only_finite_values() -> None:
    store = ResidualStore(Replica(make_parameters()).layout)
    assert store.find(1) is None
    assert store.take_back(1, np.full(40, 3.0, np.float32))
    assert not store.take_back(1, np.full(40, np.inf, np.float32))
    assert store.norm() == pytest.approx(3.0 * 40**0.5)
    assert store.blocks() == [1]
    store.clear(1)
    assert store.norm() == 0


class Slow:
    done = False


def test_buffer_is_free_only_when_the_transport_let_go_of_it() -> None:
    pool = BufferPool()
    buffer, sending = pool.take(64), Slow()
    pool.give([buffer], [SENT, sending])
    assert pool.take(64) is not buffer
    sending.done = True
    assert pool.take(64) is buffer
