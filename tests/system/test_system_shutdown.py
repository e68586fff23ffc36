"""What was started by hand ends with the cluster, wherever it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.api import Api

pytestmark = pytest.mark.timeout(300)
TOKEN = "a-token-for-this-test-0123456789"


def test_down_ends_shards_and_workers_that_were_started_by_hand(
    paramserver: Any, poll: Callable[..., Any], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN, encoding="utf-8")
    token.chmod(0o600)
    paramserver("up", "--shards", 1, "--workers", 1, "--http", "127.0.0.1:0", "--token-file", token, seconds=200.0)
    record = json.loads((paramserver.home / "cluster.json").read_text(encoding="utf-8"))
    joining = ["--coordinator", record["control"], "--name"]
    commands = (
        ["-m", "paramserver.shard", *joining, "shard-9", "--listen", "tcp://127.0.0.1:0"],
        ["-m", "worker", *joining, "worker-9"],
    )
    with (tmp_path / "by-hand.log").open("wb") as log:
        by_hand = [
            subprocess.Popen([sys.executable, "-P", *command], stdout=log, stderr=log, start_new_session=True)
            for command in commands
        ]

    def names() -> set[str]:
        with Api(record["url"], token=TOKEN) as api:
            return {session["name"] for session in api.status()["sessions"]}

    try:
        poll("those started by hand to join", lambda: {"shard-9", "worker-9"} <= names(), 120)
        ended = paramserver("down", seconds=100.0)
        assert ended.code == 0
        assert "not told to end" not in ended.err
        assert [process.wait(60) for process in by_hand] == [0, 0], (tmp_path / "by-hand.log").read_text()
    finally:
        for process in by_hand:
            process.kill()
            process.wait(20)
