"""The leases of one job as this worker holds them. No I/O, no lock: whoever owns the book brings both.

A lease goes granted -> begun -> done -> confirmed, or granted -> returned. A number never comes back, so
a grant that is repeated is known by its number.
"""

from __future__ import annotations

from collections.abc import Iterable

from paramserver.protocol.messages import Lease, LeaseDone


class LeaseBook:
    """Granted, begun, returned and done leases, by number."""

    def __init__(self) -> None:
        self._granted: dict[int, Lease] = {}  # not begun, oldest first
        self._begun: dict[int, Lease] = {}
        self._returned: set[int] = set()
        self._left_begun: set[int] = set()  # handed back in the middle: the process ends, so it stays short
        self._done: dict[int, LeaseDone] = {}
        self._confirmed: set[int] = set()  # as long as their grant is repeated
        self._is_leaving = False

    @property
    def held(self) -> tuple[int, ...]:
        return tuple(sorted([*self._begun, *self._granted]))

    @property
    def returned(self) -> tuple[int, ...]:
        return tuple(sorted(self._returned))

    @property
    def begun(self) -> tuple[int, ...]:
        """Begun and not done: nobody but this worker can run them without repeating examples."""
        return tuple(sorted([*self._begun, *self._left_begun]))

    @property
    def done(self) -> tuple[LeaseDone, ...]:
        """Finished, and not yet known to be recorded."""
        return tuple(self._done.values())

    def waiting(self, kind: str) -> int:
        """Leases of a kind that are granted and not begun."""
        return sum(lease.kind == kind for lease in self._granted.values())

    def take_orders(self, grants: Iterable[Lease], confirmed: Iterable[int], hold: int, kinds: frozenset[str]) -> bool:
        """Take in the grants of an order, of the kinds that its stage runs. True where something was handed back."""
        grants = tuple(grants)
        granted = {lease.number for lease in grants}
        for number in confirmed:
            self._done.pop(number, None)
            self._granted.pop(number, None)  # another's by now; one that is begun goes on, and its result is late
            self._confirmed.add(number)
        # What an order grants no longer it never grants again: it need not be remembered.
        self._confirmed &= granted
        self._returned &= granted
        known = self._granted.keys() | self._begun.keys() | self._done.keys() | self._returned | self._confirmed
        for lease in grants:
            if lease.number not in known:
                self._granted[lease.number] = lease
        before = len(self._returned)
        for lease in list(self._granted.values()):
            if self._is_leaving or lease.kind not in kinds:
                self._hand_back(lease)
        while self._granted and len(self._granted) + len(self._begun) > hold:
            self._hand_back(next(reversed(self._granted.values())))  # the newest would be begun last
        return len(self._returned) > before

    def begin(self, kind: str) -> Lease | None:
        """The oldest granted lease of a kind, now begun."""
        for lease in self._granted.values():
            if lease.kind == kind:
                del self._granted[lease.number]
                self._begun[lease.number] = lease
                return lease
        return None

    def finish(self, result: LeaseDone) -> None:
        """A begun lease is done: its result is reported until it is confirmed."""
        del self._begun[result.number]
        self._done[result.number] = result

    def leave(self) -> None:
        """Hand everything back and take nothing more: the process ends. Begun leases are run by others again."""
        self._is_leaving = True
        for lease in [*self._granted.values(), *self._begun.values()]:
            self._hand_back(lease)

    def _hand_back(self, lease: Lease) -> None:
        self._granted.pop(lease.number, None)
        if self._begun.pop(lease.number, None) is not None:
            self._left_begun.add(lease.number)
        self._returned.add(lease.number)
