"""`paramserver replay`: the journals of a real run give its model again, bit for bit, and say what moved it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

Commands = Callable[..., Any]
Job = Callable[..., Path]


@pytest.mark.timeout(240)
def test_a_kept_run_is_replayed_bit_for_bit_and_a_changed_model_is_told(paramserver: Commands, tiny_job: Job) -> None:
    path = tiny_job("kept", shards=2, workers=2, log="journal, keep: all")
    result = paramserver("run", path, "--json", seconds=200).json()
    run = paramserver.directory / "runs" / "kept"
    found = paramserver("replay", run, "--json", "--top", 3).json()
    assert set(found["weights"].values()) == {"identical"}
    assert set(found["parts"]) == {"shard-0", "shard-1"}
    assert all(part["first_record"] == 1 for part in found["parts"].values())
    updates = sum(part["updates"] for part in found["parts"].values())
    assert updates == result["staleness"]["all"]["updates"]
    assert sum(one["updates"] for one in found["by_worker"].values()) == updates
    assert sum(one["updates"] for one in found["by_staleness"].values()) == updates
    assert len(found["largest"]) == 3
    assert {move["worker"] for move in found["largest"]} <= {"worker-0", "worker-1"}

    early = paramserver("replay", run, "--part", "shard-0", "--until", 10, "--json").json()
    assert early["parts"]["shard-0"]["last_record"] == 10
    assert early["weights"] == {}
    assert early["parts"]["shard-0"]["updates"] < found["parts"]["shard-0"]["updates"]
    shown = paramserver("replay", run, "--worker", "worker-1", "--block", 0)
    assert "bit for bit" in shown.out
    assert "worker-0" not in shown.out

    model = load_file(run / "model.safetensors")
    name = min(model)
    model[name] = model[name].copy()
    model[name].reshape(-1)[0] += 1e-3
    save_file(model, run / "model.safetensors")
    changed = paramserver("replay", run)
    assert changed.code == 1
    assert f"{name}: differs" in changed.out


def test_what_cannot_be_replayed_is_told_clearly(paramserver: Commands, tmp_path: Path) -> None:
    missing = paramserver("replay", tmp_path / "runs" / "none")
    assert (missing.code, "there is no such folder" in missing.err) == (2, True)
    (tmp_path / "runs" / "bare").mkdir(parents=True)
    bare = paramserver("replay", tmp_path / "runs" / "bare")
    assert bare.code == 2
    assert "{log: journal, keep: all}" in bare.err
    (tmp_path / "runs" / "bare" / "journal").mkdir()
    save_file({"weight": np.zeros(1, np.float32)}, tmp_path / "runs" / "bare" / "model.safetensors")
    hollow = paramserver("replay", tmp_path / "runs" / "bare")
    assert (hollow.code, "no journal of this job" in hollow.err) == (2, True)
    (tmp_path / "runs" / "bare" / "journal" / "shard-0").mkdir()
    empty = paramserver("replay", tmp_path / "runs" / "bare")
    assert empty.code == 1
    assert "it is no journal" in empty.err
    without_part = paramserver("replay", tmp_path / "runs" / "bare", "--until", 3)
    assert (without_part.code, "--part" in without_part.err) == (2, True)
    of_no_log = tmp_path / "job.yaml"
    of_no_log.write_text("name: x\nmodel: {family: recurrent}\ndurability: {keep: all}\n")
    refused = paramserver("validate", of_no_log)
    assert refused.code == 2
    assert "use log 'journal'" in refused.err
