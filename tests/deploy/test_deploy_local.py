"""The local engine: ready means that everybody joined, and nothing that it started outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.api import Api, ApiError
from deploy.local import EngineError, LocalCluster, StoppedEarlyError, Topology, sessions_of
from paramserver.process import StopRequest

Make = Callable[..., LocalCluster]
Poll = Callable[..., Any]

PARENT = """
import sys
from pathlib import Path
from deploy.local import LocalCluster, Topology
cluster = LocalCluster(Path(sys.argv[1]), Topology(shards=1, workers=1, runs=Path(sys.argv[1]) / "runs"))
cluster.start()
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_started_cluster_has_heard_every_process(local_cluster: Make) -> None:
    cluster = local_cluster(shards=2, workers=2)
    with Api(cluster.url) as api:
        assert sessions_of(api.status()) == {"shard-0", "shard-1", "worker-0", "worker-1"}
    assert set(cluster.pids()) == {"coordinator", "shard-0", "shard-1", "worker-0", "worker-1"}
    assert cluster.deaths() == []


def test_a_stop_reaps_every_process_in_good_order(local_cluster: Make, processes: Callable[[], list[Any]]) -> None:
    cluster = local_cluster()
    assert len(processes()) == 3
    cluster.stop()
    assert processes() == []
    for name in ("coordinator", "shard-0", "worker-0"):
        text = cluster.log_path(name).read_text()
        assert "event=stopped" in text, f"{name} did not end in good order:\n{text}"
    cluster.stop()  # a second time is nothing


def test_a_killed_parent_takes_every_process_with_it(
    tmp_path: Path, processes: Callable[[], list[Any]], poll: Poll
) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        assert len(processes()) == 4
        parent.kill()
    poll("the orphans to end", lambda: not processes(), 20)


def test_a_death_is_reported_once_and_restarts_nothing(local_cluster: Make, poll: Poll) -> None:
    cluster = local_cluster()
    os.kill(cluster.pids()["worker-0"], signal.SIGKILL)
    deaths = poll("the death to be seen", cluster.deaths, 10)
    assert [(death.name, death.reason) for death in deaths] == [("worker-0", "signal SIGKILL")]
    assert cluster.deaths() == []
    assert "worker-0" not in cluster.pids()


def test_a_process_that_dies_at_start_is_told_with_its_last_words(tmp_path: Path, processes: object) -> None:
    (tmp_path / "state").write_text("a file where the coordinator wants a folder")
    with pytest.raises(EngineError, match="state"):
        LocalCluster(tmp_path, Topology(runs=tmp_path / "runs")).start()


def test_a_coordinator_that_cannot_bind_is_quoted(local_cluster: Make, tmp_path: Path) -> None:
    first = local_cluster(shards=0, workers=0)
    taken = first.url.removeprefix("http://")
    with pytest.raises(EngineError, match="coordinator ended with exit code") as caught:
        local_cluster(shards=0, workers=0, http=taken)
    assert taken.rpartition(":")[2] in str(caught.value)
    assert "coordinator.log" in str(caught.value)


def test_a_stop_during_the_start_reaps_what_was_started(tmp_path: Path, processes: Callable[[], list[Any]]) -> None:
    stop = StopRequest()
    stop.set("SIGINT")
    with pytest.raises(StoppedEarlyError):
        LocalCluster(tmp_path, Topology(runs=tmp_path / "runs")).start(stop)
    assert processes() == []


def test_a_start_that_takes_too_long_says_who_is_missing(tmp_path: Path, processes: Callable[[], list[Any]]) -> None:
    with pytest.raises(EngineError, match="waited in vain") as caught:
        LocalCluster(tmp_path, Topology(runs=tmp_path / "runs")).start(timeout_seconds=0.3)
    assert str(tmp_path / "logs") in str(caught.value)
    assert processes() == []


def test_a_hung_process_is_killed_after_its_notice(local_cluster: Make, processes: Callable[[], list[Any]]) -> None:
    cluster = local_cluster()
    os.kill(cluster.pids()["worker-0"], signal.SIGSTOP)
    cluster.stop(notice_seconds=1.0)
    assert processes() == []


def test_a_folder_named_worker_does_not_hide_ours(
    local_cluster: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "__main__.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "worker" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "worker-0" in local_cluster().pids()


def test_no_coordinator_is_one_clear_message() -> None:
    with Api("http://127.0.0.1:1") as api, pytest.raises(ApiError, match="no coordinator answers at .*--url") as caught:
        api.status()
    assert caught.value.status == 0
