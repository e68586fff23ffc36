"""The orders of the shards of one job: for each part that a process holds, in which role and with whom."""

from __future__ import annotations

from paramserver.coordinator.failover import Failover
from paramserver.coordinator.placement import Holder, PlacedPart
from paramserver.coordinator.sessions import Session
from paramserver.protocol.layout import Layout
from paramserver.protocol.messages import Member, PartAddress, Partner, PartOrder, ShardOrder, WorkerKey

# Incarnation, revision of the placement, members, keys; the checkpoint to copy for, whether blocks come from one.
Stamp = tuple[int, int, tuple[Member, ...], tuple[WorkerKey, ...], int, bool]


class ShardOrders:
    """Made anew only where something changed: an order holds the layout, which may have megabytes."""

    def __init__(self, job: str, specification: str, failover: Failover) -> None:
        self._job = job
        self._specification = specification
        self._failover = failover
        self._made: dict[str, tuple[Stamp, ShardOrder | None]] = {}

    def stamp(
        self,
        session: Session,
        members: tuple[Member, ...],
        workers: list[Session],
        checkpoint: int = 0,
        resumes: bool = False,
    ) -> Stamp:
        """What the order depends on: as long as this is the same, so is the order."""
        keys = tuple(WorkerKey(worker.name, worker.incarnation, worker.key) for worker in workers if worker.key)
        return session.incarnation, self._failover.revision, members, keys, checkpoint, resumes

    def order(self, session: Session, stamp: Stamp) -> ShardOrder | None:
        """None for a process that holds no part."""
        made = self._made.get(session.name)
        if made is None or made[0] != stamp:
            layout, held = self._failover.layout, self._failover.held_by(session)
            parts = () if layout is None else tuple(self._part(session, part, layout, stamp) for part in held)
            made = self._made[session.name] = stamp, ShardOrder(parts) if parts else None
        return made[1]

    def _part(self, session: Session, part: PlacedPart, layout: Layout, stamp: Stamp) -> PartOrder:
        role = self._failover.role_of(session, part)
        assert role is not None
        is_primary = role == "primary"
        other = part.backup if is_primary else part.primary
        _, _, members, keys, checkpoint, resumes = stamp
        return PartOrder(
            part=part.name,
            job=self._job,
            specification=self._specification,
            term=part.term,
            phase=0,
            layout=layout,
            blocks=part.blocks,
            members=members if is_primary else (),  # a backup learns what counts from the records
            workers=keys if is_primary else (),
            role=role,
            partner=None if other is None else _partner(other, part),
            checkpoint=checkpoint if is_primary else 0,
            resumes=resumes and is_primary,
        )


def addresses(parts: tuple[PlacedPart, ...]) -> tuple[PartAddress, ...]:
    """Where workers find each part, under which term, and the key that is proven there."""
    return tuple(
        PartAddress(part.name, part.primary.address, part.blocks, part.term, part.primary.key) for part in parts
    )


def _partner(holder: Holder, part: PlacedPart) -> Partner:
    return Partner(holder.shard, holder.incarnation, holder.address, holder.key, part.is_synced, part.partnership)
