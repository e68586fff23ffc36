"""The lease book of one job: which worker has which examples. It knows no socket, clock or file.

The work of a job is a numbered list of *units*: one to initialise, one to export, then the batches of every
epoch, then the batches of the evaluation. A lease number is `generation * 2^40 + unit`. The generation grows
whenever a unit becomes free again, so a number never repeats, and what a number stands for needs no table.

An epoch is a permutation that follows from (seed, epoch), made when it is reached; at most two are kept, so
millions of examples and many epochs cost memory for neither.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt

from paramserver.protocol.messages import Lease

Kind = Literal["initialise", "train", "evaluate", "export"]
Source = Literal["replica", "weights"]
Outcome = Literal["done", "duplicate", "late", "unknown"]

UNIT_BITS = 40
MAX_UNITS = 2**UNIT_BITS
_UNIT_MASK = MAX_UNITS - 1
_FIRST_TRAINED = 2  # unit
EVALUATED_SPLITS = ("valid", "test")


def split_name(split: str, source: Source = "weights") -> str:
    """The name under which results of a split are added up."""
    return f"replica:{split}" if source == "replica" and split in EVALUATED_SPLITS else split


class LeaseError(ValueError):
    """Numbers of examples that no job can be cut from; the text says which and what is allowed."""


@dataclass(frozen=True)
class LeaseState:
    """What a successor must know beside the units that are done."""

    generation: int = 0
    cursors: tuple[tuple[str, int], ...] = ()
    handed_back: tuple[int, ...] = ()  # units that are free again and were never begun
    examples_repeated: int = 0


@dataclass(frozen=True)
class LeaseCut:
    """How far training has come, for a run that goes on from here: units as LeaseBook numbers them.

    `begun` are those that somebody has started on and that are not done: granted again they repeat examples.
    """

    cursor: int  # all units from here on were never granted
    done_below: int  # all units below it are done
    done_above: tuple[int, ...] = ()
    begun: tuple[int, ...] = ()
    examples_repeated: int = 0

    def state(self) -> LeaseState:
        """What a new book begins with, beside `done`."""
        done, begun = set(self.done_above), set(self.begun)
        fresh = tuple(unit for unit in range(self.done_below, self.cursor) if unit not in done and unit not in begun)
        return LeaseState(0, (("initialise", 1), ("train", self.cursor)), fresh, self.examples_repeated)

    def done(self, trained: int) -> Iterator[int]:
        """The units that are done: the initial one, and of training those of the first `trained`."""
        yield 0
        for unit in chain(range(_FIRST_TRAINED, self.done_below), self.done_above):
            if unit < _FIRST_TRAINED + trained:
                yield unit


@dataclass
class _Pool:
    """The units [start, stop) of one kind. `free` may name units that are meanwhile held or done: skipped then."""

    start: int
    stop: int
    cursor: int
    free: list[int]
    held: dict[int, tuple[str, int]]  # unit -> (worker, lease number)
    begun: set[int]  # of those that are held: their holder has started to train on them
    lost: set[int]  # free, but perhaps trained on already: granting them again repeats examples
    done_above: set[int]
    done_below: int  # all units below it are done

    @classmethod
    def over(cls, start: int, stop: int) -> _Pool:
        return cls(start, stop, start, [], {}, set(), set(), set(), start)

    @property
    def left(self) -> int:
        """Units that are not done."""
        return self.stop - self.done_below - len(self.done_above)

    def is_done(self, unit: int) -> bool:
        return unit < self.done_below or unit in self.done_above

    def mark_done(self, unit: int) -> None:
        self.held.pop(unit, None)
        self.begun.discard(unit)
        self.lost.discard(unit)
        self.done_above.add(unit)
        while self.done_below in self.done_above:
            self.done_above.remove(self.done_below)
            self.done_below += 1

    def take(self) -> int | None:
        """The next unit that nobody holds."""
        while self.free:
            unit = heapq.heappop(self.free)
            if unit not in self.held and not self.is_done(unit):
                return unit
        while self.cursor < self.stop:
            unit, self.cursor = self.cursor, self.cursor + 1
            if not self.is_done(unit):
                return unit
        return None


class LeaseBook:
    """Grants units as leases, takes them back, and knows when all are done. One thread only.

    Args:
        batch: examples of a lease; the last one of an epoch or split may be shorter.
        epochs: passes over the split "train".
        seed: of the order of examples.
        sources: what is evaluated: the shards' weights, and the published replica where there is one.
        state, done: what an earlier book had come to (`state` property; units or lease numbers that are done).
            Units that were granted and are not done wait to be adopted. Granted again they count as repeated,
            begun or not: while nobody listened, their holder may have begun any of them.
    """

    def __init__(
        self,
        batch: int,
        epochs: int,
        seed: int,
        state: LeaseState | None = None,
        done: Iterable[int] = (),
        sources: Sequence[Source] = ("weights",),
    ) -> None:
        if batch < 1 or epochs < 1:
            raise LeaseError(f"batch {batch} and epochs {epochs} must both be at least 1")
        self._batch, self._epochs, self._seed = batch, epochs, seed
        self._sources = tuple(sources)
        self._examples: dict[str, int] = {}
        self._batches: dict[str, int] = {}
        self._restored = state
        self._restored_done = {number & _UNIT_MASK for number in done}
        self._generation = state.generation + 1 if state else 0
        self.examples_repeated = state.examples_repeated if state else 0
        self._pools: dict[Kind, _Pool] = {}
        self._add_pool("initialise", 0, 1)
        self._add_pool("export", 1, 2)

    def declare(self, examples: Mapping[str, int]) -> None:
        """Say how many examples each split has. Raises LeaseError for counts that no job can have."""
        for split, count in examples.items():
            if split not in ("train", *EVALUATED_SPLITS) or not 0 <= count < 2**32:
                raise LeaseError(
                    f"{count} examples of split {split!r}: allowed are 'train', 'valid' and 'test' with 0 to 2^32 - 1"
                )
        if examples.get("train", 0) < 1:
            raise LeaseError("the split 'train' has no example; there is nothing to train on")
        batches = {split: -(-count // self._batch) for split, count in examples.items()}
        trained = self._epochs * batches["train"]
        evaluated = len(self._sources) * sum(batches.get(split, 0) for split in EVALUATED_SPLITS)
        if 2 + trained + evaluated > MAX_UNITS:
            raise LeaseError(
                f"{self._epochs} epochs of {batches['train']} leases are more than {MAX_UNITS} leases; "
                "lower stop.epochs or raise data.batch"
            )
        self._examples, self._batches = dict(examples), batches
        first_evaluated = _FIRST_TRAINED + trained
        self._add_pool("train", _FIRST_TRAINED, first_evaluated)
        self._add_pool("evaluate", first_evaluated, first_evaluated + evaluated)

    def _add_pool(self, kind: Kind, start: int, stop: int) -> None:
        pool = self._pools[kind] = _Pool.over(start, stop)
        if self._restored is None:
            return
        pool.cursor = min(max(dict(self._restored.cursors).get(kind, start), start), stop)
        for unit in sorted(self._restored_done):
            if start <= unit < stop:
                pool.mark_done(unit)
        # Whoever was granted them may still hold them; what nobody adopts is handed out again.
        pool.free = [unit for unit in range(pool.done_below, pool.cursor) if not pool.is_done(unit)]
        pool.lost = set(pool.free) - set(self._restored.handed_back)

    @property
    def state(self) -> LeaseState:
        cursors = tuple((kind, pool.cursor) for kind, pool in sorted(self._pools.items()))
        handed_back = tuple(
            sorted(
                unit
                for pool in self._pools.values()
                for unit in set(pool.free) - pool.lost - pool.held.keys()
                if not pool.is_done(unit)
            )
        )
        return LeaseState(self._generation, cursors, handed_back, self.examples_repeated)

    def cut(self) -> LeaseCut:
        """How far training has come. Raises KeyError before `declare`."""
        pool = self._pools["train"]
        begun = (pool.begun & pool.held.keys()) | {unit for unit in pool.lost if not pool.is_done(unit)}
        above = tuple(sorted(pool.done_above))
        return LeaseCut(pool.cursor, pool.done_below, above, tuple(sorted(begun)), self.examples_repeated)

    def limit_training(self, leases: int) -> None:
        """End training after so many leases, or after those granted already where they are more."""
        pool = self._pools["train"]
        pool.stop = min(pool.stop, max(pool.start + leases, pool.cursor))

    def left(self, kind: Kind) -> int:
        """Leases of the kind that are not done, held ones included."""
        pool = self._pools.get(kind)
        return pool.left if pool else 0

    def holders(self, kind: Kind) -> dict[str, int]:
        """How many leases of the kind each worker holds; workers without one are left out."""
        counts: dict[str, int] = {}
        pool = self._pools.get(kind)
        for worker, _ in pool.held.values() if pool else ():
            counts[worker] = counts.get(worker, 0) + 1
        return counts

    def held_by(self, worker: str) -> list[int]:
        """The numbers of the leases that the worker holds, of all kinds."""
        return [number for pool in self._pools.values() for holder, number in pool.held.values() if holder == worker]

    def grant(self, kind: Kind, worker: str, leases: int) -> list[Lease]:
        """Give the worker up to so many more leases; fewer when no more are free."""
        pool = self._pools.get(kind)
        granted: list[Lease] = []
        while pool is not None and len(granted) < leases:
            unit = pool.take()
            if unit is None:
                break
            lease = self._lease(kind, pool, unit)
            if unit in pool.lost:
                pool.lost.discard(unit)
                if kind == "train":
                    self.examples_repeated += len(lease.examples)
            pool.held[unit] = (worker, lease.number)
            granted.append(lease)
        return granted

    def finish(self, worker: str, number: int) -> Outcome:
        """A worker says that the lease is done.

        "done": counted, once for a unit. "duplicate": it was done before. "late": its holder was given up and
        another holds the unit under a new number. "unknown": it was never granted to this worker.
        """
        found = self._find(number)
        if found is None:
            return "unknown"
        pool, unit = found
        if pool.is_done(unit):
            return "duplicate"
        holder, held_number = pool.held.get(unit, (worker, number))
        if held_number != number:
            return "late"
        if holder != worker:
            return "unknown"
        pool.mark_done(unit)
        return "done"

    def describe(self, number: int) -> tuple[Kind, str, int] | None:
        """Kind, split and number of examples of a lease that was granted; None for any other number.

        A split of the published replica is called "replica:valid", "replica:test".
        """
        found = self._find(number)
        if found is None:
            return None
        kind = next(kind for kind, pool in self._pools.items() if pool is found[0])
        lease = self._lease(kind, *found)
        return kind, split_name(lease.split, lease.source), len(lease.examples)

    def adopt(self, worker: str, number: int) -> bool:
        """A worker says that it holds the lease. False when the unit is done, another's, or was never granted."""
        found = self._find(number)
        if found is None:
            return False
        pool, unit = found
        if unit in pool.held:
            return pool.held[unit] == (worker, number)
        if pool.is_done(unit):
            return False
        pool.held[unit] = (worker, number)
        pool.lost.discard(unit)
        return True

    def begin(self, worker: str, numbers: Iterable[int]) -> None:
        """The worker has started on these leases: freed before they are done, they count as repeated.

        Numbers that it does not hold are ignored.
        """
        for number in numbers:
            found = self._find(number)
            if found is not None and found[0].held.get(found[1]) == (worker, number):
                found[0].begun.add(found[1])

    def give_back(self, worker: str, numbers: Iterable[int], begun: Container[int] = ()) -> int:
        """Free leases of the worker; numbers that it does not hold are ignored. Returns how many it were.

        Those that are in `begun`, or were said to be before, count as repeated when they are granted again.
        """
        freed = 0
        for number in numbers:
            found = self._find(number)
            if found is None:
                continue
            pool, unit = found
            if pool.held.get(unit) != (worker, number):
                if number not in begun and unit not in pool.held:
                    # Handed back while the book was away: nobody has trained on it.
                    pool.lost.discard(unit)
                continue
            del pool.held[unit]
            heapq.heappush(pool.free, unit)
            if number in begun or unit in pool.begun:
                pool.lost.add(unit)
            pool.begun.discard(unit)
            freed += 1
        if freed:
            self._generation += 1
        return freed

    def release(self, worker: str) -> int:
        """Free all leases of a worker that died. Returns how many it were."""
        return self.give_back(worker, self.held_by(worker))

    def _find(self, number: int) -> tuple[_Pool, int] | None:
        """The pool and unit of a number that was granted at some time."""
        unit, generation = number & _UNIT_MASK, number >> UNIT_BITS
        if generation > self._generation:
            return None
        for pool in self._pools.values():
            if pool.start <= unit < pool.cursor:
                return pool, unit
        return None

    def _lease(self, kind: Kind, pool: _Pool, unit: int) -> Lease:
        number = self._generation << UNIT_BITS | unit
        position = unit - pool.start
        if kind == "train":
            epoch, position = divmod(position, self._batches["train"])
            order = _permutation(self._seed, epoch, self._examples["train"])
            first = position * self._batch
            examples = tuple(order[first : first + self._batch].tolist())
            return Lease(number, "train", epoch=epoch, examples=examples)
        if kind == "evaluate":
            source, position = divmod(position, sum(self._batches.get(split, 0) for split in EVALUATED_SPLITS))
            split = "valid" if position < self._batches.get("valid", 0) else "test"
            position -= 0 if split == "valid" else self._batches.get("valid", 0)
            first = position * self._batch
            last = min(first + self._batch, self._examples[split])
            examples = tuple(range(first, last))
            return Lease(number, "evaluate", examples=examples, split=split, source=self._sources[source])
        return Lease(number, kind)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, examples: int) -> npt.NDArray[np.int64]:
    """The order of one epoch (examples,), int64; the caller may not change it."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(examples)
