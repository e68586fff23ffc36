"""A worker's part in a checkpoint: it stops between two batches, copies what is its own, and waits.

Its own are the residuals, each with the sequence of the last update of its block, and the optimizer's state where the
job runs that on the workers. A resumed job gives them to the worker of the same name (`adopt`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from paramserver.process import log
from paramserver.protocol.pieces import Upload
from paramserver.protocol.workerfile import KeptResidual, KeptWorker
from worker.desk import Desk, JobState
from worker.errors import JobFailure
from worker.exchange import Exchange
from worker.local_optimizer import LocalOptimizer

LEASE_PATIENCE_SECONDS = 2.0  # how long a lease in the middle may take to end before it is cut
PAUSE_SECONDS = 15.0  # longer than the coordinator gives a cut (10 s): whoever goes on before it is over would spoil it

RESIDUAL, OPTIMIZER = "residual", "optimizer"


class CheckpointStop:
    """Between the trainer, which asks at each boundary, and the desk, which knows the order. One thread.

    Args:
        look: waits a little, and raises where the job is not this worker's any more.
    """

    def __init__(
        self,
        desk: Desk,
        state: JobState,
        exchange: Exchange,
        optimizer: LocalOptimizer | None,
        look: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desk = desk
        self._state = state
        self._exchange = exchange
        self._optimizer = optimizer
        self._look = look
        self._clock = clock
        self._seen = (0, 0.0)  # the checkpoint that is due, and since when

    def is_due(self, is_between_leases: bool) -> bool:
        """Whether to stop here: a lease may end first, within reason, so that nothing is repeated."""
        number = self._state.order.checkpoint
        if not number or number == self._state.stopped_for:
            return False
        if self._seen[0] != number:
            self._seen = number, self._clock()
        return is_between_leases or self._clock() - self._seen[1] >= LEASE_PATIENCE_SECONDS

    def stop(self) -> None:
        """Copy the own state, say so, and wait until training goes on. Call when nothing is on its way."""
        number = self._state.order.checkpoint
        if not number:
            return
        began = self._clock()
        if self._state.checkpoint != number:
            content = worker_file(self._exchange, self._optimizer)
            upload = Upload(content) if content else None
            self._desk.stop_for(self._state, number, upload)
        while self._state.order.checkpoint == number and self._clock() - began < PAUSE_SECONDS:
            self._look()
        if self._state.order.checkpoint == number:
            log("checkpoint-left", level="warning", number=number, reason=f"no word within {PAUSE_SECONDS:.0f} s")
        self._desk.go_on(self._state, number)
        self._state.counters.waiting_seconds += self._clock() - began


def worker_file(exchange: Exchange, optimizer: LocalOptimizer | None) -> bytes:
    """The file of what is this worker's own, a copy; empty where it has nothing."""
    tensors: dict[str, Tensor] = {}
    residuals = []
    for block, (sequence, residual, norm) in exchange.kept_residuals().items():
        tensors[f"{RESIDUAL}.{block}"] = residual
        residuals.append(KeptResidual(block, sequence, norm))
    for parameter, own in (optimizer.state_dict() if optimizer is not None else {}).items():
        for key, value in own.items():
            tensors[f"{OPTIMIZER}.{key}.{parameter}"] = value.detach().cpu().contiguous()
    if not tensors:
        return b""
    kept = KeptWorker(exchange.worker, exchange.incarnation, tuple(residuals))
    return save(tensors, metadata={"worker": msgspec.json.encode(kept).decode()})


def adopt(content: bytes, blocks: frozenset[int], exchange: Exchange, optimizer: LocalOptimizer | None) -> None:
    """Go on with a predecessor's file: its residuals of these blocks, and its optimizer's state.

    Raises JobFailure for a file that does not fit the model.
    """
    try:
        tensors: Mapping[str, Any] = load(content)
        state: dict[str, dict[str, Tensor]] = {}
        residuals: dict[int, Tensor] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == OPTIMIZER:
                key, _, parameter = rest.partition(".")
                state.setdefault(parameter, {})[key] = tensor
            elif int(rest) in blocks:
                residuals[int(rest)] = tensor
        if optimizer is not None:
            optimizer.load_state_dict(state)
        for block, residual in residuals.items():
            exchange.adopt_residual(block, np.asarray(residual.numpy(), np.float32))
    except (SafetensorError, ValueError, KeyError) as error:
        raise JobFailure(
            f"the state that the checkpoint keeps of this worker's predecessor cannot be gone on with: {error}; "
            "submit the job without --resume, or with another checkpoint"
        ) from None
    log("state-adopted", residuals=len(residuals), optimizer=bool(state))
