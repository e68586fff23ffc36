"""The job store: what must survive the coordinator, in one SQLite file with one writer.

Write-ahead logging with `synchronous = NORMAL`: a commit survives the death of the process at any moment; a
power cut may take the last commits, never the file's consistency. Queue entries, results and placements are synced: a
coordinator that forgot that a primary may go on alone would promote a backup that lacks what was acknowledged since.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from paramserver.coordinator.core import Stored
from paramserver.coordinator.effects import (
    Effect,
    JobRecord,
    LeaseResult,
    SaveDocument,
    SaveDone,
    SaveJob,
    SaveName,
)
from paramserver.coordinator.lifecycle import ACTIVE_STATES, FINAL_STATES
from paramserver.protocol.messages import LeaseDone

FILE_NAME = "coordinator.sqlite"
FORMAT = 1
_TABLES = """
CREATE TABLE names (name TEXT PRIMARY KEY, incarnation INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, number INTEGER UNIQUE NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL,
    submitted TEXT NOT NULL, warnings TEXT NOT NULL, specification TEXT NOT NULL);
CREATE TABLE documents (
    job TEXT NOT NULL REFERENCES jobs (id), kind TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (job, kind));
CREATE TABLE done (
    job TEXT NOT NULL REFERENCES jobs (id), number INTEGER NOT NULL, kind TEXT NOT NULL, split TEXT NOT NULL,
    examples INTEGER NOT NULL, steps INTEGER NOT NULL, elements INTEGER NOT NULL, loss_sum REAL NOT NULL,
    skipped_steps INTEGER NOT NULL, metrics TEXT NOT NULL, PRIMARY KEY (job, number)) WITHOUT ROWID;
"""


_KEYS = "CREATE TABLE IF NOT EXISTS keys (name TEXT PRIMARY KEY, key TEXT NOT NULL) WITHOUT ROWID"


def _must_sync(fact: Effect) -> bool:
    if isinstance(fact, SaveDocument):
        return fact.kind == "placed"
    return isinstance(fact, SaveJob) and fact.record.state in ("queued", *FINAL_STATES)


class StoreError(Exception):
    """A store that cannot be used: the text says which file, why, and what to do."""


class Store:
    """Open the store in `folder`, made where it is not there. Raises StoreError. One thread only."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, isolation_level=None, timeout=1.0)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{self.path}: cannot be opened: {error}; give another folder with --state") from error
        try:
            # Held for the life of the process: a second coordinator on the same folder is refused at once.
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute("BEGIN IMMEDIATE")
            found = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                for statement in _TABLES.split(";"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {FORMAT}")
            if found in (0, FORMAT):
                self._connection.execute(_KEYS)
            self._connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            self._connection.close()
            raise StoreError(
                f"{self.path}: {error}; another coordinator may be running on this state folder: stop it, "
                "or give this one another --state"
            ) from error
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise StoreError(f"{self.path}: no usable store: {error}; move it away or give another --state") from error
        if found not in (0, FORMAT):
            self._connection.close()
            raise StoreError(f"{self.path}: has format {found}, this release knows {FORMAT}; give another --state")

    def close(self) -> None:
        self._connection.close()

    def save(self, effects: Iterable[Effect]) -> None:
        """Store the facts among the effects in one transaction."""
        facts = [fact for fact in effects if isinstance(fact, SaveName | SaveJob | SaveDocument | SaveDone)]
        if not facts:
            return
        must_sync = any(_must_sync(fact) for fact in facts)
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if must_sync else 'NORMAL'}")
        self._connection.execute("BEGIN")
        try:
            for fact in facts:
                self._save(fact)
            self._connection.execute("COMMIT")
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise

    def _save(self, fact: SaveName | SaveJob | SaveDocument | SaveDone) -> None:
        execute = self._connection.execute
        match fact:
            case SaveName():
                execute("INSERT OR REPLACE INTO names VALUES (?, ?)", (fact.name, fact.incarnation))
                if fact.key:
                    execute("INSERT OR REPLACE INTO keys VALUES (?, ?)", (fact.name, fact.key))
            case SaveJob():
                record = fact.record
                execute(
                    "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?) "
                    "ON CONFLICT (id) DO UPDATE SET state = excluded.state, reason = excluded.reason",
                    (
                        record.id,
                        record.number,
                        record.state,
                        record.reason,
                        record.submitted,
                        json.dumps(record.warnings),
                        record.specification,
                    ),
                )
                if record.state in FINAL_STATES:
                    # Only a job that goes on needs them.
                    execute("DELETE FROM done WHERE job = ?", (record.id,))
                    execute("DELETE FROM documents WHERE job = ? AND kind != 'result'", (record.id,))
            case SaveDocument():
                execute(
                    "INSERT OR REPLACE INTO documents VALUES (?, ?, ?)", (fact.job, fact.kind, json.dumps(fact.body))
                )
            case SaveDone():
                result, done = fact.result, fact.result.done
                execute(
                    "INSERT OR IGNORE INTO done VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        fact.job,
                        done.number,
                        result.kind,
                        result.split,
                        result.examples,
                        done.steps,
                        done.elements,
                        done.loss_sum,
                        done.skipped_steps,
                        json.dumps(done.metrics),
                    ),
                )

    def document(self, job: str, kind: str) -> dict[str, Any] | None:
        """One of a job's documents, None where it has none."""
        row = self._connection.execute("SELECT body FROM documents WHERE job = ? AND kind = ?", (job, kind)).fetchone()
        return None if row is None else msgspec.json.decode(row[0])

    def load(self) -> Stored:
        """Everything that a coordinator goes on with."""
        execute = self._connection.execute
        jobs = tuple(
            JobRecord(
                id=row[0],
                number=row[1],
                state=row[2],
                reason=row[3],
                submitted=row[4],
                warnings=tuple(json.loads(row[5])),
                specification=row[6],
            )
            for row in execute(
                "SELECT id, number, state, reason, submitted, warnings, specification FROM jobs ORDER BY number"
            )
        )
        documents: dict[str, dict[str, dict[str, Any]]] = {}
        for job, kind, body in execute("SELECT job, kind, body FROM documents"):
            documents.setdefault(job, {})[kind] = msgspec.json.decode(body)
        results = {
            job.id: [
                LeaseResult(
                    row[1], row[2], row[3], LeaseDone(row[0], row[4], row[5], row[6], row[7], json.loads(row[8]))
                )
                for row in execute(
                    "SELECT number, kind, split, examples, steps, elements, loss_sum, skipped_steps, metrics "
                    "FROM done WHERE job = ?",
                    (job.id,),
                )
            ]
            for job in jobs
            if job.state in ACTIVE_STATES
        }
        incarnations = dict(execute("SELECT name, incarnation FROM names"))
        keys = dict(execute("SELECT name, key FROM keys"))
        return Stored(jobs=jobs, incarnations=incarnations, documents=documents, results=results, keys=keys)
