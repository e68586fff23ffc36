"""The job store and the run folders: what survives."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from paramserver.coordinator.effects import (
    JobRecord,
    LeaseResult,
    SaveDocument,
    SaveDone,
    SaveJob,
    SaveName,
)
from paramserver.coordinator.runs import RunFolder
from paramserver.coordinator.store import FILE_NAME, Store, StoreError
from paramserver.protocol.messages import LeaseDone

RECORD = JobRecord("job", 1, '{"name": "job"}', ("careful",), "today", state="training")
RESULT = LeaseResult("train", "train", 4, LeaseDone(2**60, 3, 40, 1.5, 1, {"right": 2.0}))
FACTS = [
    SaveName("w", 3),
    SaveJob(RECORD),
    SaveDocument("job", "progress", {"a": [1]}),
    SaveDone("job", RESULT),
]


def reopen_after_kill(store: Store, folder: Path) -> Store:
    """What a successor finds when the process was killed: the files as they are, nothing closed."""
    shutil.copytree(store.path.parent, folder)
    return Store(folder)


def test_everything_committed_is_there_after_a_kill(tmp_path: Path) -> None:
    store = Store(tmp_path / "one")
    store.save(FACTS)
    again = reopen_after_kill(store, tmp_path / "two")
    stored = again.load()
    assert stored.jobs == (RECORD,)
    assert stored.incarnations == {"w": 3}
    assert stored.documents == {"job": {"progress": {"a": [1]}}}
    assert stored.results == {"job": [RESULT]}
    store.close()
    again.close()


def test_lease_is_recorded_as_done_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save([*FACTS, SaveDone("job", RESULT)])
    assert store.load().results == {"job": [RESULT]}
    store.close()


def test_job_that_is_over_keeps_its_result_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    over = JobRecord("job", 1, RECORD.specification, RECORD.warnings, "today", state="failed", reason="why")
    store.save([*FACTS, SaveDocument("job", "result", {"state": "failed"}), SaveJob(over)])
    stored = store.load()
    assert stored.jobs == (over,)
    assert stored.documents == {"job": {"result": {"state": "failed"}}}
    assert not stored.results
    store.close()


def test_facts_are_stored_together_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path)
    clash = JobRecord("other", 1, "{}", (), "today")
    with pytest.raises(sqlite3.IntegrityError):
        store.save([SaveName("w", 1), SaveJob(RECORD), SaveJob(clash)])
    assert store.load().jobs == ()
    store.save(FACTS)
    assert store.load().incarnations == {"w": 3}
    store.close()


def test_second_coordinator_on_one_state_folder_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    code = (
        "import sys, pathlib\nfrom paramserver.coordinator.store import Store, StoreError\n"
        "try:\n    Store(pathlib.Path(sys.argv[1]))\nexcept StoreError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "another coordinator may be running" in done.stdout
    store.close()


def test_file_that_is_no_store_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match="no usable store"):
        Store(tmp_path)


def test_store_of_another_format_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match="format 99"):
        Store(tmp_path)


def test_run_folder_holds_specification_metrics_result_and_model(tmp_path: Path) -> None:
    runs = RunFolder(tmp_path / "runs")
    assert not runs.is_taken("job")
    runs.open("job", json.dumps({"name": "job", "seed": 3}))
    assert runs.is_taken("job")
    runs.append_metrics("job", {"step": 1})
    runs.append_metrics("job", {"step": 2})
    runs.write_result("job", {"state": "done"})
    runs.store_part("job", 0, memoryview(b"old bytes"))
    runs.store_part("job", 0, memoryview(b"abc"))
    runs.store_part("job", 3, memoryview(b"def"))
    assert not runs.model("job").exists()
    runs.seal_model("job")
    folder = tmp_path / "runs" / "job"
    assert yaml.safe_load((folder / "job.yaml").read_text()) == {"name": "job", "seed": 3}
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert json.loads((folder / "result.json").read_text()) == {"state": "done"}
    assert runs.model("job").read_bytes() == b"abcdef"
    assert sorted(path.name for path in folder.iterdir()) == [
        "job.yaml",
        "metrics.jsonl",
        "model.safetensors",
        "result.json",
    ]


def test_existing_run_folder_is_never_reused(tmp_path: Path) -> None:
    runs = RunFolder(tmp_path)
    runs.open("job", "{}")
    with pytest.raises(FileExistsError):
        runs.open("job", "{}")
