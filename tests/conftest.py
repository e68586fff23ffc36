"""Real processes for tests: each in a folder of its own, reaped whatever happens, and proven to be gone.

Every process that a test starts, however indirectly, inherits a mark in its environment. After the test
nothing with that mark may live.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.local import LocalCluster, Topology
from models.datasets.folder import VARIABLE

MARK = "PARAMSERVER_TEST_MARK"
ENDING_SECONDS = 20.0


def wait_until(what: str, is_so: Callable[[], Any], seconds: float = 60.0, pause: float = 0.05) -> Any:
    """Poll until `is_so` gives something true, and return it; fail with `what` when the time is over."""
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(pause)
    return found


@pytest.fixture
def poll() -> Callable[..., Any]:
    """poll(what, is_so, seconds=60)."""
    return wait_until


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[psutil.Process]]]:
    """The processes that this test has started and that live. Afterwards there may be none."""
    resource_tracker.ensure_running()  # else the first test that spawns would start it, and it outlives the test
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield lambda: _marked(mark)
    deadline = time.monotonic() + ENDING_SECONDS
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    names = [" ".join(process.cmdline()) for process in left]
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)
    assert not names, f"orphans were left: {names}"


@pytest.fixture
def local_cluster(tmp_path: Path, processes: object) -> Iterator[Callable[..., LocalCluster]]:
    """local_cluster(shards=1, workers=1, **topology): a started cluster in tmp_path/cluster-N."""
    clusters: list[LocalCluster] = []

    def make(shards: int = 1, workers: int = 1, **topology: Any) -> LocalCluster:
        directory = tmp_path / f"cluster-{len(clusters)}"
        topology.setdefault("runs", directory / "runs")
        cluster = LocalCluster(directory, Topology(shards=shards, workers=workers, **topology))
        clusters.append(cluster)
        cluster.start()
        return cluster

    yield make
    for cluster in clusters:
        cluster.stop()


@pytest.fixture
def data_root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the published data sets; PARAMSERVER_DATA, or else ../shared/data beside the repository.

    Tests of data sets skip where the data is absent, and fail there in CI: absence must be seen.
    """
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    root = Path(os.environ.get(VARIABLE) or beside)
    if not all((root / name).is_dir() for name in ("mnist", "ptb", "shakespeare")):
        reason = f"no data sets in {root}; set {VARIABLE} to the folder that holds mnist/, ptb/ and shakespeare/"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    monkeypatch.setenv(VARIABLE, str(root))
    return root


class Commands:
    """`paramserver` as a user calls it, in a folder and with a home of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.home = directory / "home"

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "paramserver.cli", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env={
                **os.environ,
                "PARAMSERVER_HOME": str(self.home),
                "TMPDIR": str(self.directory),  # a failed run keeps its logs there
                "COLUMNS": "200",
                **environment,
            },
            start_new_session=True,
        )

    def __call__(self, *arguments: object, seconds: float = 100.0, **environment: str) -> Finished:
        """Run a command to its end."""
        with self.start(*arguments, **environment) as process:
            try:
                out, err = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                out, err = process.communicate()
                pytest.fail(f"paramserver {arguments} took more than {seconds} s:\n{out}\n{err}")
        return Finished(process.returncode, out, err)


class Finished:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        assert "Traceback" not in err, f"a user saw a traceback:\n{err}"

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def paramserver(tmp_path: Path, processes: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Commands]:
    """Runs commands; a cluster that `up` left is taken down afterwards."""
    monkeypatch.delenv("PARAMSERVER_URL", raising=False)
    commands = Commands(tmp_path)
    yield commands
    if (commands.home / "cluster.json").exists():
        commands("down")


TINY_JOB = """
name: {name}
seed: 1
model: {{family: recurrent, args: {{task: char-lm, cell: gru, hidden: {hidden}}}}}
data: {{name: python-source, batch: 4, window: 16, windows: 4, max_chars: {chars}}}
cluster: {{shards: {shards}, workers: {workers}}}
push: {{encoding: int4}}
pull: {{encoding: ternary}}
durability: {{log: {log}}}
stop: {{epochs: {epochs}}}
"""


@pytest.fixture
def tiny_job(tmp_path: Path) -> Callable[..., Path]:
    """tiny_job(name="tiny", hidden=16, chars=120000, shards=1, workers=1, epochs=1): a job file."""

    def make(name: str = "tiny", **changes: int | str) -> Path:
        fields: dict[str, int | str] = {
            "hidden": 16,
            "chars": 120_000,
            "shards": 1,
            "workers": 1,
            "epochs": 1,
            "log": "none",
            **changes,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(TINY_JOB.format(name=name, **fields), encoding="utf-8")
        return path

    return make
