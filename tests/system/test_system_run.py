"""`paramserver run` from the user's side: a whole job on real processes, and what is left afterwards."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Commands = Callable[..., Any]
Job = Callable[..., Path]
Processes = Callable[[], list[Any]]


def _await_line(stream: Any, part: str, later: list[str] | None = None) -> threading.Thread:
    """Read the stream up to a line that holds `part`, then go on draining it in a thread, into `later`."""
    for line in stream:
        if part in line:
            break
    else:
        pytest.fail(f"the output ended without {part!r}")
    drain = threading.Thread(target=lambda: (later if later is not None else []).append(stream.read()))
    drain.start()
    return drain


@pytest.mark.timeout(240)
def test_a_job_runs_from_file_to_model(paramserver: Commands, tiny_job: Job, processes: Processes) -> None:
    path = tiny_job("whole", shards=2, workers=2)
    # As on a fresh machine: every kernel is compiled anew, by several processes at a time.
    done = paramserver("run", path, "--json", seconds=200, NUMBA_CACHE_DIR=str(paramserver.directory / "kernels"))
    assert processes() == []
    result = done.json()
    folder = paramserver.directory / "runs" / "whole"
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["state"] == "done"
    assert result["examples_repeated"] == 0, result
    assert result["workers_lost"] == []
    assert result["steps"] >= 1000
    assert 1.0 < result["valid"]["bits"] < 5.0
    assert 1.0 < result["test"]["bits"] < 5.0
    assert 4.2 < result["push_bits_encoded"] < 4.8, "int4, after a hundred updates in int8"
    assert result["push_bits_full_precision"] == 32.0
    assert 1.8 < result["pull_bits_encoded"] < 4.0, "two ternary deltas a step at the most"
    assert result["replica"]["valid"]["bits"] == pytest.approx(result["valid"]["bits"], rel=0.02)
    assert result["replica"]["valid"]["bits"] != result["valid"]["bits"]
    assert result["staleness"]["all"]["updates"] > 0
    assert "training" in done.err

    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["steps"] for line in metrics]
    assert steps == sorted(steps)
    assert steps[-1] == result["steps"]
    loss = _validation_loss(path, folder / "model.safetensors")
    assert loss == pytest.approx(result["valid"]["loss"], rel=1e-4), "the export is not the model that was evaluated"


def _validation_loss(path: Path, model: Path) -> float:
    """Nats a symbol of the exported weights in a plain task of this process."""
    from safetensors.torch import load_file

    from models.recurrent.task import build
    from paramserver.families import families
    from paramserver.job import load_job

    job = load_job(path)
    family = families()["recurrent"]
    arguments, data = family.arguments.model_validate(job.model.args), family.data.model_validate(job.data)
    task = build(arguments, data, job.seed, "cpu")
    weights, own = load_file(model), task.export()
    assert set(weights) == set(own)
    for name, tensor in own.items():
        tensor.copy_(weights[name])
    examples, batch = task.examples("valid"), job.data["batch"]
    rows = [
        task.evaluate(one)
        for start in range(0, examples, batch)
        for one in task.batches("valid", range(start, min(start + batch, examples)))
    ]
    return sum(row.loss_sum for row in rows) / sum(row.elements for row in rows)


@pytest.mark.timeout(240)
def test_ctrl_c_cancels_reaps_and_exits_130(paramserver: Commands, tiny_job: Job, processes: Processes) -> None:
    with paramserver.start("run", tiny_job("interrupted", epochs=100)) as process:
        drain = _await_line(process.stderr, "| loss ")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        drain.join()
    assert processes() == []
    result = json.loads((paramserver.directory / "runs" / "interrupted" / "result.json").read_text())
    assert result["state"] == "cancelled"


@pytest.mark.timeout(240)
def test_ctrl_c_during_the_start_reaps_and_exits_130(
    paramserver: Commands, tiny_job: Job, processes: Processes
) -> None:
    with paramserver.start("run", tiny_job()) as process:
        drain = _await_line(process.stderr, "starting")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        drain.join()
    assert processes() == []


@pytest.mark.timeout(240)
def test_a_job_that_fails_says_why_and_exits_1(paramserver: Commands, tiny_job: Job, processes: Processes) -> None:
    path = tiny_job("short")
    text = paramserver.directory / "short.txt"
    text.write_text("a text that is too short for its windows\n" * 40)
    content = path.read_text().replace("name: python-source,", f"name: text-file, path: {text},")
    path.write_text(content.replace("windows: 4, max_chars: 120000", "windows: 4000"))
    done = paramserver("run", path, seconds=200)
    assert done.code == 1, done.err
    assert "short failed: " in done.err
    assert "The logs are kept in " in done.err
    assert "failed" in done.out


def _pid_of(processes: Processes, name: str) -> int:
    (found,) = [process.pid for process in processes() if name in process.cmdline()]
    return int(found)


@pytest.mark.timeout(240)
def test_a_killed_shard_and_a_killed_coordinator_are_started_again_and_the_job_ends(
    paramserver: Commands, tiny_job: Job, processes: Processes
) -> None:
    shown: list[str] = []
    with paramserver.start("run", tiny_job("mended", log="journal", epochs=2), "--json") as process:
        drain = _await_line(process.stderr, "| loss ", shown)
        os.kill(_pid_of(processes, "shard-0"), signal.SIGKILL)
        os.kill(_pid_of(processes, "paramserver.coordinator"), signal.SIGKILL)
        result = json.loads(process.stdout.read())
        assert process.wait(120) == 0
        drain.join()
    assert processes() == []
    assert result["state"] == "done"
    assert result["shards_recovered"] == ["shard-0"]
    for name in ("shard-0", "coordinator"):
        assert f"{name} was killed (SIGKILL), started again" in shown[0]


@pytest.mark.timeout(240)
def test_a_killed_shard_without_a_journal_fails_the_job_although_it_is_started_again(
    paramserver: Commands, tiny_job: Job, processes: Processes
) -> None:
    shown: list[str] = []
    with paramserver.start("run", tiny_job("unkept", epochs=100)) as process:
        drain = _await_line(process.stderr, "| loss ", shown)
        os.kill(_pid_of(processes, "shard-0"), signal.SIGKILL)
        process.stdout.read()
        assert process.wait(120) == 1
        drain.join()
    assert processes() == []
    assert "shard-0 was killed (SIGKILL), started again" in shown[0]
    assert "'shard-0' died" in shown[0]
    assert "durability {log: journal} survives such a death" in shown[0]
