"""What a snapshot keeps beside arrays: plain values, one class for each part of a shard's state.

The parts themselves make and take these (`state`, `restore`); their arrays go by name into one dictionary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from paramserver.protocol.messages import PartOrder, StalenessRow, TrafficRow

FORMAT = 1

Arrays = dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int64]]


class BlockState(Struct, frozen=True):
    """Arrays: N.weights, N.state0, N.state1 ... of (elements,), for block N."""

    index: int
    version: int
    marks: dict[str, tuple[int, int]]  # worker -> last applied (incarnation, sequence)
    first_values: str  # hex of the hash of its first values; empty where it has none


class ReplicaState(Struct, frozen=True):
    """Arrays: N.published (elements,), N.versions (int64, of editions from `first_edition` on).

    The log of deltas is not kept: after a restart it starts empty, and who is behind gets a snapshot.
    """

    block: int
    edition: int
    first_edition: int
    since: int
    unseen: int
    is_still: bool
    held: int
    last_push: dict[str, int]
    slow: tuple[str, ...]  # pushers whose pulls hold them up
    period: int
    is_coarse: bool


class PublishingState(Struct, frozen=True):
    replicas: tuple[ReplicaState, ...] = ()
    steps: tuple[tuple[int, int, float], ...] = ()  # of `coded`: block, elements, smoothed sum of squares


class RoundState(Struct, frozen=True):
    """Array: N.round (elements,), the sum of the updates so far."""

    block: int
    contributors: tuple[str, ...]
    updates: int
    staleness: int
    waiting: tuple[str, ...] = ()  # contributors whose pulls wait for it


class PolicyState(Struct, frozen=True):
    members: tuple[str, ...]
    steps: dict[str, int] = {}  # bounded: clocks, and what makes them comparable
    offsets: dict[str, int] = {}
    greeted: tuple[str, ...] = ()
    quorum: int = 0  # sync
    is_draining: bool = False
    rounds: tuple[RoundState, ...] = ()
    closed: tuple[tuple[int, int], ...] = ()  # block, its rounds so far
    turns: tuple[tuple[int, str, int], ...] = ()  # block, member, the round that its next push is for


class TelemetryState(Struct, frozen=True):
    pushes: int
    pulls: int
    updates: int
    duplicates: int
    traffic: tuple[TrafficRow, ...]
    staleness: tuple[StalenessRow, ...]


class State(Struct, frozen=True):
    """All of a shard's state for one job, but for its arrays, connections and parked pulls."""

    order: PartOrder
    has_trained: bool
    blocks: tuple[BlockState, ...]
    publishing: PublishingState
    policy: PolicyState
    telemetry: TelemetryState
