"""The exchange of a worker with all shards: one step's updates out, fresh values in.

With overlap, `begin` returns when everything is on its way, the next batch is computed, and `settle`
takes the answers in. A block has at most one update in flight, so its sequence has no gaps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from paramserver.account import Account
from paramserver.encoding import Encoding, EncodingError, parse_encoding
from paramserver.process import log
from paramserver.protocol.buffers import BufferPool
from paramserver.protocol.messages import (
    BlockUpdate,
    BlockValue,
    Initialise,
    PartAddress,
    Pull,
    Push,
    RefusedUpdate,
    Want,
)
from paramserver.protocol.transport import Bytes, Transport
from worker.client import Identity, ShardClient
from worker.counters import Counters
from worker.cutting import Cutting
from worker.encoder import FULL_PRECISION, UpdateEncoder
from worker.errors import JobFailure
from worker.pace import Pace
from worker.replica import BlockGradients, Replica
from worker.request import ASKING, Request

IN_FLIGHT = 8  # unanswered messages a shard: enough to hide a round trip, few enough for the shard's memory
LONGEST_WAIT_SECONDS = 0.25  # how late a stop or a new order may be seen
COMPLAIN_SECONDS = 10.0

Editions = npt.NDArray[np.int64]
Source = Literal["replica", "weights"]
Cut = tuple[int, ...]  # the blocks of one message


def always_go_on() -> None:
    """The guard of an exchange that nobody takes away."""


@dataclass(frozen=True)
class Codec:
    """How the updates of each block are encoded, and how long an answer may take."""

    encodings: Sequence[Encoding]  # (blocks,)
    deadline_seconds: float = 5.0
    error: float = 0.6  # adaptive: the root of the share of the squares that may stay behind
    error_limit: float = 0.8  # the same where the wire is what a step waits for
    settling_updates: int = 0  # of the model, over which both grow to their size; others use int8 until then


class Exchange:
    """A worker's side of push and pull. Used from one thread.

    Args:
        placement: the shards and the blocks that each holds; together every block of the layout, once.
        guard: called at least every LONGEST_WAIT_SECONDS while something is awaited; raises to end the wait.
        clock: seconds, monotonic.
        is_resumed: the same incarnation has pushed for this job before, and what became of its last updates
            is not known: the shard is asked which sequence is next.
        account: where acknowledged updates are noted.
    """

    def __init__(
        self,
        transport: Transport,
        placement: Sequence[PartAddress],
        identity: Identity,
        replica: Replica,
        codec: Codec,
        counters: Counters,
        guard: Callable[[], None] = always_go_on,
        clock: Callable[[], float] = time.monotonic,
        is_resumed: bool = False,
        account: Account | None = None,
    ) -> None:
        self._pool = BufferPool()
        self._encoder = UpdateEncoder(
            replica.layout,
            codec.encodings,
            self._pool,
            codec.error,
            replica.devices,
            codec.error_limit,
            codec.settling_updates,
        )
        self.residuals = self._encoder.residuals
        self._transport = transport
        self._identity = identity
        self._replica = replica
        self._counters = counters
        self._sequences = [ASKING if is_resumed else 0] * len(replica.layout.blocks)  # the last one pushed
        self._guard = guard
        self._clock = clock
        self._pace = Pace(len(replica.layout.blocks))
        self._last_request = 0
        self._clients: list[ShardClient] = []
        self._cuttings: list[Cutting] = []  # by shard
        blocks = replica.layout.blocks
        placed = sorted(block for shard in placement for block in shard.blocks)
        if placed != list(range(len(blocks))):
            raise JobFailure(f"the placement names {len(placed)} blocks, not each of the layout's {len(blocks)} once")
        for shard in placement:
            channel = transport.connect(shard.address, shard.key)
            deadline = codec.deadline_seconds
            self._clients.append(
                ShardClient(channel, shard.part, identity, shard.term, deadline, counters, self, account)
            )
            self._cuttings.append(Cutting([blocks[block] for block in shard.blocks], codec.encodings))

    # --------------------------------------------------------------------- the calls

    def begin(
        self, gradients: Mapping[str, Tensor], editions: Editions, step: int, computing_seconds: float = inf
    ) -> None:
        """Push gradients (by parameter name) and ask for fresh values of all blocks.

        Returns when everything is encoded and on its way, so the gradients may change. `editions` (blocks,)
        are those that the gradients were computed on; `step` counts the worker's finished steps, this one
        included, and `computing_seconds` is what its computation took: where exchanges take longer, an adaptive
        encoding sends less, and shards publish less often. What was in flight must be settled. Raises what the guard
        raises, and JobFailure.
        """
        views = self._replica.gradients(gradients)
        # Who joins, or goes on from a checkpoint, has seen no version yet; a model has at least as many as editions.
        updates = max(self._pace.updates, int(editions.max(initial=0)))
        self._encoder.plan(views, self._pace.byte_limit(computing_seconds), updates)
        self._pace.begin(self._clock(), self._counters, computing_seconds)
        touched: set[str] = set()

        def request(client: ShardClient, cut: Cut) -> Request:
            if any(block in views for block in cut):
                touched.add(client.shard)
            return self._update(client, cut, views, editions, step)

        self._post(request)
        for client in self._clients:
            if client.shard not in touched:
                client.tick(step)

    def pull(self, step: int, source: Source = "replica") -> None:
        """Bring every block up to date and wait for it.

        Source "weights" writes the shards' own weights at full precision, which are no replica: the next pull
        without it brings the replica back.
        """
        self.ask(step, source)
        self.settle()

    def ask(self, step: int, source: Source = "replica") -> None:
        """The same without waiting: what a step without an update does."""
        self._post(lambda client, cut: Request(self._pull_message(client, cut, step, source), awaited=set(cut)))

    def tick(self, step: int) -> None:
        """Tell every shard the clock of a step that pushes nothing."""
        for client in self._clients:
            client.tick(step)

    def settle(self, patience_seconds: float = inf) -> None:
        """Wait, at most so long, until everything is answered and pulled values are written into the replica."""
        began = self._clock()
        give_up_at = began + patience_seconds
        self._wait(lambda: self._clock() >= give_up_at or self._is_settled(), give_up_at)
        if self._is_settled():
            now = self._clock()
            self._pace.end(now, self._counters, now - began)

    def _is_settled(self) -> bool:
        return all(client.is_settled for client in self._clients)

    def settle_pushes(self) -> None:
        """Wait until every update has its verdict; values may still be on their way."""
        self._wait(lambda: not any(client.undecided for client in self._clients))

    def abandon_pulls(self) -> None:
        """Wait for no more values: the step that they were for is not taken."""
        for client in self._clients:
            client.forget_pulls()

    def initialise(self) -> None:
        """Give the shards the replica's present values as the first ones, and wait until they have them."""

        def request(client: ShardClient, cut: Cut) -> Request:
            message = Initialise(
                request=self._next_request(),
                job=self._identity.job,
                term=client.term,
                layout=self._identity.layout,
                blocks=cut,
            )
            memory = client.channel.memory()
            frames = [self._encoder.encode_whole(self._replica.values(block), memory) for block in cut]
            return Request(message, frames, is_unconfirmed=True)

        self._post(request, bytes_a_second=0.0)  # at full precision: cut as finely
        self.settle()

    def flush(self, step: int, is_last: bool = False) -> None:
        """Push every residual at full precision and wait until it is acknowledged.

        `is_last`: nobody trains any more, so the shards take residuals at a small learning rate. A residual whose
        update is finally refused is held again, and counted as the update's refusal.
        """
        holding = set(self.residuals.blocks())

        def request(client: ShardClient, cut: Cut) -> Request | None:
            blocks = [block for block in cut if block in holding]
            if not blocks:
                return None
            memory = client.channel.memory()
            frames = [self._encoder.encode_residual(block, memory) for block in blocks]
            for block in blocks:
                self.residuals.clear(block)
            full = [FULL_PRECISION] * len(blocks)
            return self._push(client, blocks, frames, full, self._replica.editions, step, (), is_last)

        self._post(request, bytes_a_second=0.0)
        self.settle_pushes()

    @property
    def worker(self) -> str:
        return self._identity.worker

    @property
    def incarnation(self) -> int:
        return self._identity.incarnation

    def kept_residuals(self) -> dict[int, tuple[int, Tensor, float]]:
        """Block -> (sequence of its last update, a copy of its residual on the host, the residual's norm).

        Call when every update has its verdict. Blocks that hold nothing back are left out.
        """
        kept = {}
        for block in self.residuals.blocks():
            residual = self.residuals.copy(block)
            # One that never pushed since it took the job up anew does not know its sequence, and has no residual.
            sequence = self._sequences[block] if self._sequences[block] < ASKING else 0
            kept[block] = sequence, residual, float(torch.linalg.vector_norm(residual))
        return kept

    def adopt_residual(self, block: int, values: npt.NDArray[np.float32]) -> None:
        """Add a predecessor's residual (elements,) to the next update of a block. Raises ValueError."""
        elements = self._replica.layout.blocks[block].elements
        if values.size != elements:
            raise ValueError(f"the residual of block {block} has {values.size} elements, the block has {elements}")
        if not self.residuals.take_back(block, values):
            raise ValueError(f"the residual of block {block} is not finite")

    def follow(self, placement: Sequence[PartAddress]) -> None:
        """Go on with each part where it is now and under its term: its shard may have died and be back, or another."""
        placed = {part.part: part for part in placement}
        for client in self._clients:
            there = placed.get(client.shard)
            if there is None or there.term < client.term:
                continue
            client.term = there.term
            if there.address != client.channel.address:
                log("shard-moved", shard=client.shard, address=there.address)
                client.move(self._transport.connect(there.address, there.key))

    def close(self) -> None:
        for client in self._clients:
            client.close()

    # ------------------------------------------------------------------- the messages

    def _update(
        self, client: ShardClient, cut: Cut, gradients: BlockGradients, editions: Editions, step: int
    ) -> Request:
        """One message of a step: the updates of its blocks, and the wish for their values."""
        blocks = [block for block in cut if block in gradients and self._encoder.sends(block)]
        if not blocks:
            return Request(self._pull_message(client, cut, step), awaited=set(cut))
        memory = client.channel.memory()
        frames = [self._encoder.encode(block, gradients, memory) for block in blocks]
        encodings = [self._encoder.encoding(block) for block in blocks]
        return self._push(client, blocks, frames, encodings, editions, step, self._wants(cut))

    def _push(
        self,
        client: ShardClient,
        blocks: list[int],
        frames: list[Bytes],
        encodings: Sequence[Encoding],
        editions: Editions,
        step: int,
        wants: tuple[Want, ...],
        is_last: bool = False,
    ) -> Request:
        updates = []
        for block, encoding in zip(blocks, encodings, strict=True):
            sequence = self._sequences[block] = self._sequences[block] + 1
            updates.append(BlockUpdate(block, sequence, max(int(editions[block]), 0), encoding.identifier))
        return Request(
            Push(
                **self._head(client, step),
                updates=tuple(updates),
                wants=wants,
                is_pull_slow=self._pace.is_pull_slow,
                is_last=is_last,
            ),
            frames,
            undecided={block: position for position, block in enumerate(blocks)},
            awaited={want.block for want in wants},
        )

    def _pull_message(self, client: ShardClient, cut: Sequence[int], step: int, source: Source = "replica") -> Pull:
        return Pull(**self._head(client, step), wants=self._wants(cut), source=source)

    def _wants(self, cut: Sequence[int]) -> tuple[Want, ...]:
        held = self._replica.editions
        return tuple([Want(block, int(held[block])) for block in cut])

    def _head(self, client: ShardClient, step: int) -> dict[str, Any]:
        return {
            "request": self._next_request(),
            "job": self._identity.job,
            "term": client.term,
            "worker": self._identity.worker,
            "incarnation": self._identity.incarnation,
            "step": step,
        }

    def _next_request(self) -> int:
        self._last_request += 1
        return self._last_request

    # ---------------------------------------------------------- the answers (see Sink)

    def acknowledged(self, block: int, version: int) -> None:
        self._pace.saw_version(block, version)

    def refused_update(self, request: Request, position: int, why: RefusedUpdate) -> None:
        """Decode a finally refused update back into its residual; its sequence is free again."""
        assert isinstance(request.message, Push)  # only a Push carries updates
        update = request.message.updates[position]
        values = np.empty(self._replica.layout.blocks[update.block].elements, np.float32)
        parse_encoding(update.encoding).decode(request.frames[position], values)
        if not self.residuals.take_back(update.block, values):
            log("update-lost", level="error", block=update.block, reason="its values are not finite", code=why.code)
        self._sequences[update.block] -= 1

    def renumbered(self, block: int, sequence: int) -> None:
        """The shard said which sequence is next, and the update that asked carries it now."""
        self._sequences[block] = sequence

    def value(self, value: BlockValue, frames: Sequence[memoryview]) -> bool:
        """Write a pulled value into the replica. Raises JobFailure where the weights are not finite."""
        if value.kind == "current":
            return int(self._replica.editions[value.block]) == value.edition
        if not frames or (value.kind != "deltas" and len(frames) != 1):
            self._counters.refusals["malformed"] += 1
            return False
        arrays = [np.frombuffer(frame, np.uint8) for frame in frames]
        try:
            if value.kind == "deltas":
                return self._replica.apply_deltas(value.block, value.edition, value.encoding, arrays)
            if value.kind == "weights":
                self._replica.forget(value.block)
            self._replica.write(value.block, value.edition, value.encoding, arrays[0])
            if value.kind == "weights":
                self._replica.forget(value.block)
        except EncodingError as error:
            self._counters.refusals[error.code] += 1
            if error.code == "not-finite":
                # No later update can mend them, so asking again would never end.
                raise JobFailure(
                    f"the weights of block {value.block} are not finite any more: training has diverged; "
                    "lower optimizer.lr, or set optimizer.clip"
                ) from None
            log("value-unusable", level="warning", block=value.block, code=error.code, reason=error)
            return False
        return True

    def completed(self, request: Request) -> None:
        """Take a complete request's buffers back."""
        self._pool.give(request.frames, request.sendings)

    # ------------------------------------------------------------------------ waiting

    def _post(self, make: Callable[[ShardClient, Cut], Request | None], bytes_a_second: float | None = None) -> None:
        """Make and send the request of each message, at most IN_FLIGHT unanswered ones a shard.

        All shards work at once, and none waits for another's room. A held pull is no reason to stop: it may wait
        for the very updates that come after it. The link's speed is the last one seen where none is given.
        """
        speed = self._pace.bytes_a_second if bytes_a_second is None else bytes_a_second
        left = [
            (client, deque(cutting.at(speed))) for client, cutting in zip(self._clients, self._cuttings, strict=True)
        ]
        while left:
            for client, cuts in left:
                if client.in_flight < IN_FLIGHT and (request := make(client, cuts.popleft())) is not None:
                    client.submit(request, self._clock())
            left = [(client, cuts) for client, cuts in left if cuts]
            self._wait(lambda: not left or any(client.in_flight < IN_FLIGHT for client, _ in left))  # noqa: B023

    def _wait(self, is_over: Callable[[], bool], until: float = inf) -> None:
        """Serve answers until it is over. There is always a next deadline: requests are sent again."""
        started = self._clock()
        complain_at = started + COMPLAIN_SECONDS
        while not is_over():
            self._guard()
            self._serve(min(LONGEST_WAIT_SECONDS, max(0.0, until - self._clock())))
            now = self._clock()
            if now >= complain_at:
                complain_at = now + COMPLAIN_SECONDS
                waiting = "; ".join(client.describe() for client in self._clients if not client.is_settled)
                log("waiting", level="warning", seconds=round(now - started, 1), awaited=waiting)
        self._counters.waiting_seconds += self._clock() - started

    def _serve(self, timeout_seconds: float) -> None:
        """Take in what has arrived, waiting at most so long for the first, then send what is due."""
        now = self._clock()
        due = min((client.poll(now) for client in self._clients), default=inf)
        timeout = min(timeout_seconds, max(0.0, due - now))
        ready = self._transport.wait([client.channel for client in self._clients], timeout)
        for client in self._clients:
            if client.channel in ready:
                while (received := client.channel.receive(0)) is not None:
                    client.handle(received, self._clock())
        self._counters.in_flight = sum(len(client.requests) for client in self._clients)
