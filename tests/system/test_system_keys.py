"""Closed doors with real processes: the commands of docs/security.md, strangers, and listed nodes that pretend."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.api import Api
from deploy.local import LocalCluster
from paramserver.protocol.keys import load_keys, make_keys
from paramserver.protocol.messages import Refusal, Register, Registered
from paramserver.protocol.transport import Received
from paramserver.protocol.zeromq import ZeroMQTransport

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
RSYNC = """#!/bin/sh
# Stands for rsync between machines that are folders beside each other: the last argument is HOST:FOLDER.
shift
for last; do :; done
target="../${last%%:*}/${last#*:}"
mkdir -p "$target"
while [ $# -gt 1 ]; do cp -p "$1" "$target"; shift; done
"""


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class Machines:
    """Folders a, b and c that stand for machines, and the commands that the document gives to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        block = DOCUMENT.read_text(encoding="utf-8").split("## Keys on three machines", 1)[1].split("```")[1]
        ports = {"10.0.0.1:5700": f"127.0.0.1:{free_port('127.0.0.1')}"}
        ports |= {"10.0.0.2:5701": f"127.0.0.2:{free_port('127.0.0.2')}", "127.0.0.1:8420": "127.0.0.1:0"}
        for shown, ours in ports.items():
            assert shown in block
            block = block.replace(shown, ours)
        self.commands = [(line[0], line[3:]) for line in block.strip().splitlines()]
        tools = folder / "bin"
        tools.mkdir()
        for name, text in {
            "rsync": RSYNC,
            "paramserver": f'#!/bin/sh\nexec {sys.executable} -P -m paramserver.cli "$@"\n',
            "python": f'#!/bin/sh\nexec {sys.executable} -P "$@"\n',
        }.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        self.started: list[subprocess.Popen[bytes]] = []

    def run(self, machine: str, command: str) -> None:
        (self.folder / machine).mkdir(exist_ok=True)
        done = subprocess.run(
            command, shell=True, cwd=self.folder / machine, env=self.environment, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr.decode()

    def start(self, machine: str, command: str) -> subprocess.Popen[bytes]:
        log = (self.folder / machine / "log").open("wb")
        with log:
            process = subprocess.Popen(
                f"exec {command}", shell=True, cwd=self.folder / machine, env=self.environment, stdout=log, stderr=log
            )
        self.started.append(process)
        return process


@pytest.fixture
def machines(tmp_path: Path, processes: object) -> Iterator[Machines]:
    made = Machines(tmp_path)
    yield made
    for process in reversed(made.started):
        process.terminate()
        process.wait(30)


def test_commands_of_the_document_train_a_job_on_three_machines(
    machines: Machines, tiny_job: Callable[..., Path], paramserver: Any, poll: Callable[..., Any]
) -> None:
    assert len(machines.commands) == 5
    for machine, command in machines.commands[:2]:
        machines.run(machine, command)
    for machine in "bc":
        secrets = [path.name for path in (machines.folder / machine / "keys").glob("*.key_secret")]
        assert secrets == [{"b": "shard-0.key_secret", "c": "worker-0.key_secret"}[machine]]
    for machine, command in machines.commands[2:]:
        machines.start(machine, command)
    ready = machines.folder / "a" / "ready.json"
    poll("the coordinator", ready.exists)
    url = json.loads(ready.read_text())["http"]
    job = paramserver("submit", tiny_job(), "--url", url).out.strip()

    def state() -> str:
        for process in machines.started:
            assert process.poll() is None, [path.read_text() for path in machines.folder.glob("?/log")]
        return str(paramserver("status", job, "--url", url, "--json").json()["state"])

    poll("the job's end", lambda: state() in ("done", "failed"), seconds=90, pause=1.0)
    assert state() == "done"
    found = paramserver("status", "--url", url, "--json").json()
    keys = {session["name"]: session["key"] for session in found["sessions"]}
    assert keys["shard-0"] == load_keys(machines.folder / "b" / "keys", "shard-0").own.public
    assert keys["worker-0"] == load_keys(machines.folder / "c" / "keys", "worker-0").own.public
    assert found["handshake_failures"] == 0
    assert not found["refusals"]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    for name in ("coordinator", "shard-0", "worker-0", "idle"):
        make_keys(tmp_path / "keys", name)
    return tmp_path / "keys"


def answer_to(transport: ZeroMQTransport, address: str, key: str, message: Any) -> Any:
    """What the coordinator answers, or None where it answers nothing in a while."""
    channel = transport.connect(address, key)
    channel.send(message)
    received = channel.receive(3.0)
    return received.message if isinstance(received, Received) else None


def test_stranger_and_pretender_are_refused_while_the_cluster_goes_on(
    local_cluster: Callable[..., LocalCluster], keys: Path, tmp_path: Path, poll: Callable[..., Any]
) -> None:
    cluster = local_cluster(keys=keys)
    stolen = Register(role="worker", name="worker-0", incarnation=1)
    make_keys(tmp_path / "strange", "stranger")
    strange = load_keys(tmp_path / "strange", "stranger", keys / "coordinator.key")
    idle = load_keys(keys, "idle")
    transports = [ZeroMQTransport(strange), ZeroMQTransport(), ZeroMQTransport(idle)]
    try:
        with Api(cluster.url) as api:
            shard = next(one["address"] for one in api.status()["sessions"] if one["role"] == "shard")
            assert answer_to(transports[0], cluster.control, strange.coordinator, stolen) is None
            assert answer_to(transports[1], cluster.control, "", stolen) is None
            assert answer_to(transports[1], shard, "", stolen) is None
            poll("the refused handshakes to be counted", lambda: api.status()["handshake_failures"] >= 2)
            pretended = answer_to(transports[2], cluster.control, idle.coordinator, stolen)
            assert isinstance(pretended, Refusal)
            assert pretended.code == "wrong-key"
            poll("the refusal to be counted", lambda: api.status()["refusals"].get("wrong-key") == 1)
            honest = Register(role="worker", name="idle")
            assert isinstance(answer_to(transports[2], cluster.control, idle.coordinator, honest), Registered)

            # Withdrawn: no new connection, and the open one ends with its session.
            (keys / "worker-0.key").unlink()
            poll("the withdrawn worker's session to end", lambda: "worker-0" not in names(api.status()))
    finally:
        for transport in transports:
            transport.close()


def names(status: dict[str, Any]) -> set[str]:
    return {session["name"] for session in status["sessions"]}


def test_listener_of_a_process_beyond_loopback_needs_keys(tmp_path: Path, processes: object) -> None:
    modules = {
        "paramserver.coordinator": ["--runs", "runs", "--state", "state", "--ready-file", "ready.json"],
        "paramserver.shard": ["--coordinator", "tcp://127.0.0.1:1", "--name", "shard-0"],
    }
    for module, arguments in modules.items():
        done = subprocess.run(
            [sys.executable, "-P", "-m", module, *arguments, "--listen", "tcp://*:0"],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert re.search("without keys.*paramserver keygen.*--keys DIR.*--insecure", done.stderr)


def test_keygen_makes_what_up_needs_and_never_overwrites(paramserver: Any, tmp_path: Path) -> None:
    refused = paramserver("up", "--keys", tmp_path / "keys")
    assert refused.code == 2
    mend = re.search(r"`paramserver (keygen --to .*)`", refused.err)
    assert mend
    assert paramserver(*mend[1].split()).code == 0
    made = paramserver("keygen", "--to", tmp_path / "more", "--json").json()["secrets"]
    assert list(made) == ["coordinator", "shard-0", "shard-1", "worker-0", "worker-1"]
    token = Path(paramserver("keygen", "--to", tmp_path / "keys", "--token", "--json").json()["token_file"])
    for path in (token, *map(Path, made.values())):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = {path: path.read_bytes() for path in (tmp_path / "keys").iterdir()}
    for again in (["--token"], ["worker-9", "worker-0"], []):
        done = paramserver("keygen", "--to", tmp_path / "keys", *again)
        assert done.code == 2
        assert "there already" in done.err
    assert {path: path.read_bytes() for path in (tmp_path / "keys").iterdir()} == before

    up = paramserver("up", "--shards", 1, "--workers", 1, "--keys", tmp_path / "keys", "--token-file", token, "--json")
    found = paramserver("status", "--json", "--url", up.json()["url"]).json()
    assert all(session["key"] for session in found["sessions"])
