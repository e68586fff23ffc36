"""Which process is what to each part of a job, and what follows when one of them dies or comes back.

Level triggered: `look` compares the placement with the sessions that live and puts it right. Every change is given to
`store` before any order can rest on it, so a successor of the coordinator never knows less than a shard was told.
The rules are in docs/architecture.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from paramserver.coordinator.placement import Holder, PlacedPart, Placement, after, loads
from paramserver.coordinator.sessions import Session
from paramserver.protocol.layout import Layout
from paramserver.protocol.messages import PartReport

RETURN_SECONDS = 10.0  # how long a shard may take to be heard again, after the coordinator's restart or its own death
RECOVERY_SECONDS = 60.0  # how long nobody may serve a part before the job fails
REPLACE_SECONDS = 10.0  # so long a lost backup's place is kept for a shard that holds nothing; then any may take it
LOOK_SECONDS = 0.05  # between two looks at the whole placement, unless something has happened
CALM_SECONDS = 3.0  # how long nothing may have changed before the load is evened out
EVEN_ENOUGH = 0.75  # something moves only where its new shard then has at most so much of what its old one had

Shards = Mapping[str, Session]  # the live ones that have spoken, by name


@dataclass(frozen=True)
class Away:
    """A part that nobody serves now."""

    since: float
    was: Holder  # who served it last
    how: str  # what became of that one, in words
    then: Literal["waits", "failover", "hand-over"] = "waits"  # who should serve it: itself, or another process


@dataclass(frozen=True)
class Lost:
    """A shard's session that has ended."""

    heard_at: float
    how: str


class Failover:
    """Of one job.

    Args:
        has_journal: whether a process that is started again knows what it acknowledged.
        backups: how many other processes should hold each part; 0 or 1.
        session_seconds: after so long a silence a session ends.
        settled_at: before it nobody is given up: after a restart of the coordinator, processes are on their way back.
        due_at: the same for a primary that nothing can replace.
        store: keeps a placement, before anything rests on it.
        note: tells people what happened.
    """

    def __init__(
        self,
        has_journal: bool,
        backups: int,
        session_seconds: float,
        settled_at: float,
        due_at: float,
        store: Callable[[Placement], None],
        note: Callable[[str, float], None],
    ) -> None:
        self.layout: Layout | None = None
        self.revision = 0  # of the placement: grows with every change
        self.seconds: list[float] = []
        """Of each failover: from the end of the primary's session until its backup served in its place."""
        self._has_journal = has_journal
        self._backups = backups
        self._session_seconds = session_seconds
        self._settled_at = settled_at
        self._due_at = due_at
        self._store = store
        self._note = note
        self._parts: dict[str, PlacedPart] = {}
        self._look_due = -math.inf
        self._away: dict[str, Away] = {}  # by part
        self._vacant_since: dict[str, float] = {}  # by part that should have a backup and has none
        self._lost: dict[tuple[str, int], Lost] = {}  # by shard and incarnation
        self._empty_since: dict[str, float] = {}  # by part whose backup in step says that it stores nothing
        self._unfit: dict[tuple[str, str, int], str] = {}  # part, shard, incarnation -> why it cannot hold the part
        self._changed_at = -math.inf  # when the placement changed last

    # ------------------------------------------------------------------------ what is placed

    def begin(self, placement: Placement, layout: Layout) -> None:
        """Take up a first placement, or the stored one of an earlier coordinator."""
        self._parts, self.layout = {part.name: part for part in placement.parts}, layout
        self.revision += 1
        self._look_due = -math.inf

    @property
    def is_placed(self) -> bool:
        return self.layout is not None

    def part(self, name: str) -> PlacedPart | None:
        return self._parts.get(name)

    @property
    def parts(self) -> tuple[PlacedPart, ...]:
        return tuple(self._parts.values())

    def role_of(self, session: Session, part: PlacedPart) -> Literal["primary", "backup"] | None:
        """What this very process is to the part."""
        if is_held_by(part.primary, session):
            return "primary"
        return "backup" if part.backup is not None and is_held_by(part.backup, session) else None

    def held_by(self, session: Session) -> list[PlacedPart]:
        """The parts that this process holds, in any role."""
        return [part for part in self.parts if self.role_of(session, part) is not None]

    def is_away(self, name: str) -> bool:
        """Whether nobody is known to serve the part now."""
        return name in self._away

    def away_figures(self, now: float) -> dict[str, float]:
        """Seconds since it was served, by part."""
        return {name: now - away.since for name, away in sorted(self._away.items())}

    def waits_for(self) -> str:
        """Which parts nobody serves, in words; empty where all are served."""
        texts = []
        for name, away in sorted(self._away.items()):
            part = self._parts[name]
            if away.then != "waits":
                texts.append(f"waiting for {part.primary.shard} to serve part {name}")
            else:
                names = (
                    {part.primary.shard, part.backup.shard} if part.is_synced and part.backup else {part.primary.shard}
                )
                texts.append(
                    f"waiting for {' or '.join(sorted(names))}, with the journal of {name}: start it again under the "
                    "same name and --state"
                )
        return "; ".join(texts)

    def _change(self, part: PlacedPart, now: float, **changes: Any) -> PlacedPart:
        """Store the part's new situation; orders that rest on it can only follow."""
        changed = replace(part, **changes)
        assert changed.term >= part.term
        if changed.backup is not None and changed.backup != part.backup:
            changed = replace(changed, partnership=part.partnership + 1)
        self._parts[part.name] = changed
        self.revision += 1
        self._changed_at = now
        self._look_due = -math.inf
        self._store(Placement(self.parts))
        return changed

    # -------------------------------------------------------------------------- what is heard

    def lost(self, session: Session, now: float) -> None:
        """A shard's session has ended."""
        if any(self.role_of(session, part) for part in self.parts):
            how = f"it was not heard of for {now - session.heard_at:.1f} s"
            self._lost[session.name, session.incarnation] = Lost(session.heard_at, how)
            self._look_due = -math.inf

    def unfit(self, session: Session, part: PlacedPart, why: str, now: float) -> None:
        """This process says that it cannot hold the part, for good."""
        if self._may_hold(part, session):
            self._unfit[part.name, session.name, session.incarnation] = why
            self._look_due = -math.inf
            self._note(f"{session.name} cannot hold part {part.name}: {why}", now)

    def hear(self, session: Session, part: PlacedPart, report: PartReport, now: float) -> Away | None:
        """The primary of a part says that it serves it under its term. Returns what that ends, if nobody served it."""
        away = self._away.pop(part.name, None)
        if away is not None:
            seconds, self._look_due = now - away.since, -math.inf
            if away.then == "failover":
                self.seconds.append(seconds)
            what = {
                "waits": f"again, {seconds:.1f} s after it was missed",
                "failover": f"under term {part.term}, {seconds:.1f} s after the session of {away.was.shard} ended",
                "hand-over": f"under term {part.term}, {seconds:.1f} s after {away.was.shard} gave it up",
            }[away.then]
            self._note(f"{session.name} serves part {part.name} {what}", now)
        backup, about = part.backup, (report.partner, report.partner_incarnation, report.partner_number)
        # It may have been about a backup that the part had before.
        is_about = backup is not None and about == (backup.shard, backup.incarnation, part.partnership)
        if backup is not None and is_about and report.is_synced and not part.is_synced:
            self._change(part, now, is_synced=True)
            self._note(f"{backup.shard} is in step as backup of part {part.name}", now)
        return away

    def hear_backup(self, part: PlacedPart, report: PartReport, now: float) -> None:
        """The backup of a part says what it has; one in step that has nothing, and goes on having nothing, is none."""
        if not part.is_synced or report.record:
            self._empty_since.pop(part.name, None)
        elif now - self._empty_since.setdefault(part.name, now) > self._session_seconds / 2:
            del self._empty_since[part.name]
            assert part.backup is not None
            self._change(part, now, backup=None, is_synced=False, grants=part.grants + 1)
            text = (
                f"{part.backup.shard} has lost what it stored of part {part.name}; {part.primary.shard} goes on without"
            )
            self._note(text, now)

    # ----------------------------------------------------------------------------- the rules

    def look(self, shards: Shards, now: float) -> str:
        """Put the placement right, if it was not looked at just now. Returns why the job cannot go on; empty else."""
        if now < self._look_due:
            return ""
        self._look_due = now + LOOK_SECONDS
        for name in list(self._parts):
            if why := self._look_at(name, shards, now):
                return why
        if self._parts and self._backups and now >= self._settled_at:
            self._find_backups(shards, now)
            if self._is_calm(shards, now):
                self._even_out(shards, now)
        return ""

    def _look_at(self, name: str, shards: Shards, now: float) -> str:
        part = self._parts[name]
        if self._is_fit(part, part.primary, shards):
            self._grant(part, shards, now)
        elif self._is_gone(part, shards, now) and (why := self._miss_primary(part, shards, now)):
            return why
        away = self._away.get(name)
        if away is not None and now - away.since > RECOVERY_SECONDS:
            why = self._unfit.get((name, part.primary.shard, part.primary.incarnation), "")
            how = f"it did not come back within {RECOVERY_SECONDS:.0f} s" + (f"; it says: {why}" if why else "")
            return self._epitaph(self._parts[name], how)
        return ""

    def _is_gone(self, part: PlacedPart, shards: Shards, now: float) -> bool:
        """Whether a primary that is not here is more than late; after a coordinator's restart all are, for a while."""
        primary, backup = part.primary, part.backup
        if (primary.shard, primary.incarnation) in self._lost or primary.shard in shards:
            return True
        can_replace = backup is not None and part.is_synced and self._is_fit(part, backup, shards)
        return now >= (self._settled_at if can_replace else self._due_at)

    def _miss_primary(self, part: PlacedPart, shards: Shards, now: float) -> str:
        """The primary is not here. Returns why nothing can replace it, where that is so."""
        known = self._away.get(part.name)
        is_new = known is None or known.then != "waits"
        if is_new:
            lost = self._lost.get((part.primary.shard, part.primary.incarnation))
            unfit = self._unfit.get((part.name, part.primary.shard, part.primary.incarnation))
            self._away[part.name] = Away(now, part.primary, unfit or (lost.how if lost else "it was not heard of"))
        if not self._has_journal:
            return self._why_lost_for_good(part, shards)
        if not self._replace_primary(part, shards, now) and is_new:
            self._note(f"{part.primary.shard} died ({self._away[part.name].how}); part {part.name} waits for it", now)
        return ""

    def _replace_primary(self, part: PlacedPart, shards: Shards, now: float) -> bool:
        """Its backup in step, or its own successor with the journal, takes its place. Returns whether one does."""
        is_settled = now >= self._settled_at
        backup = part.backup if part.is_synced else None
        if backup is not None and self._is_fit(part, backup, shards):
            if is_settled:
                self._promote(part, backup, now)
            return is_settled
        successor = shards.get(part.primary.shard)
        if successor is not None and (backup is None or is_settled) and self._may_hold(part, successor):
            # Its backup stays the recorded one until it serves: should its journal be unusable, the backup's is not.
            self._change(part, now, term=part.term + 1, primary=holder_of(successor))
            return True
        # Both had died. The backup's successor has on its disk all that was acknowledged, as the primary's would have.
        stand_in = shards.get(backup.shard) if backup is not None else None
        if stand_in is None or not self._may_hold(part, stand_in):
            return False
        if now - self._away[part.name].since <= RETURN_SECONDS:
            return False
        self._promote(part, holder_of(stand_in), now)
        return True

    def _promote(self, part: PlacedPart, holder: Holder, now: float) -> None:
        away, term = self._away[part.name], part.term + 1
        self._change(part, now, term=term, primary=holder, backup=None, is_synced=False, failovers=part.failovers + 1)
        self._away[part.name] = replace(away, then="failover")
        text = f"{part.primary.shard} died ({away.how}); {holder.shard} takes over part {part.name} under term {term}"
        self._note(text, now)

    def _grant(self, part: PlacedPart, shards: Shards, now: float) -> None:
        """The primary is here and its backup is not: it may go on without, once that is stored."""
        backup = part.backup
        if backup is None or self._is_fit(part, backup, shards) or now < self._settled_at or part.name in self._away:
            return
        lost = self._lost.get((backup.shard, backup.incarnation))
        primary = shards[part.primary.shard]
        if lost is not None and primary.heard_at - lost.heard_at < self._session_seconds / 2:
            return  # it may have died at the same moment; then both are worth waiting for
        self._change(part, now, backup=None, is_synced=False, grants=part.grants + part.is_synced)
        if part.is_synced:
            self._note(f"{primary.name} goes on without a backup of part {part.name}: {backup.shard} is lost", now)
        else:
            self._note(f"{backup.shard} is lost before it was in step as backup of part {part.name}", now)

    def _find_backups(self, shards: Shards, now: float) -> None:
        """A new backup, not in step yet, for each part that is served without one."""
        lonely = {part.name for part in self.parts if part.backup is None and part.name not in self._away}
        self._vacant_since = {name: self._vacant_since.get(name, now) for name in lonely}
        if not lonely:
            return
        idle = {name for name, session in shards.items() if not self.held_by(session)}
        for name, since in self._vacant_since.items():
            part = self._parts[name]
            free = [
                shard
                for shard, session in shards.items()
                if shard != part.primary.shard
                and self._may_hold(part, session)
                and (shard in idle or now - since > REPLACE_SECONDS)
            ]
            if free:
                load, ring = loads(self._parts.values(), free), after(sorted(shards), part.primary.shard)
                chosen = shards[min(free, key=lambda shard: (load[shard], ring.index(shard)))]
                self._change(part, now, backup=holder_of(chosen))
                self._note(f"{chosen.name} becomes backup of part {name}", now)

    def _is_calm(self, shards: Shards, now: float) -> bool:
        """Whether every part has been served, with its backup in step, for a while."""
        if self._away or now - self._changed_at <= CALM_SECONDS:
            return False
        return all(part.is_synced and self._is_fit(part, part.primary, shards) for part in self.parts)

    def _even_out(self, shards: Shards, now: float) -> None:
        """Give work back to a shard that has less than its share, since it was away: one step at a time.

        A backup in step is made primary where its shard serves less than the primary's. Where none is, a backup moves
        to the shard that serves least from one that holds more; until that one is in step the part has no backup.
        """
        served = dict.fromkeys(shards, 0)
        for part in self.parts:
            served[part.primary.shard] += part.weights_bytes
        held = loads(self._parts.values(), shards)
        least = min(sorted(shards), key=lambda shard: (served[shard], held[shard]))
        handing, moving = [], []
        for part in self.parts:
            assert part.backup is not None
            size, primary, backup = part.weights_bytes, part.primary.shard, part.backup.shard
            if self._is_fit(part, part.backup, shards):
                handing.append(((served[backup] + size) / served[primary], part.name))
            if least not in (primary, backup) and self._may_hold(part, shards[least]):
                # Rather one whose primary serves much: it can be handed over next.
                moving.append((held[least] + size <= EVEN_ENOUGH * held[backup], served[primary], part.name))
        if handing and min(handing)[0] <= EVEN_ENOUGH:
            self._hand_over(self._parts[min(handing)[1]], now)
        elif moving and max(moving)[0]:
            part = self._parts[max(moving)[2]]
            self._change(part, now, backup=holder_of(shards[least]), is_synced=False)
            self._note(f"{least} becomes backup of part {part.name}, to even out the load", now)

    def _hand_over(self, part: PlacedPart, now: float) -> None:
        """The backup in step becomes primary and the primary its backup."""
        backup, term = part.backup, part.term + 1
        assert backup is not None
        self._change(part, now, term=term, primary=backup, backup=part.primary, is_synced=False)
        self._away[part.name] = Away(now, part.primary, "", "hand-over")
        self._note(f"{part.primary.shard} hands part {part.name} to {backup.shard} under term {term}", now)

    # --------------------------------------------------------------------------------- words

    def _is_fit(self, part: PlacedPart, holder: Holder, shards: Shards) -> bool:
        """Whether that very process lives, and has not said that it cannot hold the part."""
        session = shards.get(holder.shard)
        return session is not None and is_held_by(holder, session) and self._may_hold(part, session)

    def _may_hold(self, part: PlacedPart, session: Session) -> bool:
        return (part.name, session.name, session.incarnation) not in self._unfit

    def _why_lost_for_good(self, part: PlacedPart, shards: Shards) -> str:
        """Without a journal nothing brings the part back."""
        if part.primary.shard in shards:
            return self._epitaph(part, "another process took its name")
        if lost := self._lost.get((part.primary.shard, part.primary.incarnation)):
            return self._epitaph(part, lost.how)
        return self._epitaph(part, "it did not come back after the coordinator's restart")

    def _epitaph(self, part: PlacedPart, how: str) -> str:
        """Why a job fails whose part is lost, and what to do."""
        assert self.layout is not None
        mend = "submit the job again"
        if not self._has_journal:
            mend += "; durability {log: journal} survives such a death, and with backups: 1 nobody waits for it"
        return (
            f"{part.primary.shard!r} died ({how}) and with it {len(part.blocks)} of {len(self.layout.blocks)} blocks, "
            f"{part.weights_bytes / 1e6:.1f} MB of weights; no backup in step could take over: start the "
            f"shard again and {mend}"
        )

    def lost_values(self, part: PlacedPart) -> str:
        """The same where the process is here and its values are not."""
        return self._epitaph(part, "it has lost their values")


def holder_of(session: Session) -> Holder:
    return Holder(session.name, session.incarnation, session.address, session.key)


def is_held_by(holder: Holder, session: Session) -> bool:
    return (holder.shard, holder.incarnation) == (session.name, session.incarnation)
