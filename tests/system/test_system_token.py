"""A cluster with a bearer token, as its operator and a stranger see it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKEN = "a-token-of-this-test-0123456789"


def test_cluster_with_a_token_obeys_its_operator_and_nobody_else(
    paramserver: Callable[..., Any], tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    doors = ("--http", "0.0.0.0:0", "--token-file", file, "--token-for-reading")
    url = paramserver("up", "--shards", 1, "--workers", 1, *doors, "--json").json()["url"]
    url = url.replace("0.0.0.0", "127.0.0.1")

    for stranger in ({}, {"PARAMSERVER_TOKEN": "a-guess-of-a-stranger-0123"}):
        for command in (("submit", tiny_job()), ("status",), ("jobs",), ("cancel", "tiny")):
            refused = paramserver(*command, "--url", url, **stranger)
            assert refused.code == 2
            assert "bearer token" in refused.err
    assert paramserver("jobs", PARAMSERVER_TOKEN="ü").code == 2

    # Waits for more workers than there are, so that nothing is trained here.
    job = tiny_job("waiting", workers=9)
    assert paramserver("submit", job, "--url", url, PARAMSERVER_TOKEN=TOKEN).out.strip() == "waiting"
    assert [found["id"] for found in paramserver("jobs", "--json").json()] == ["waiting"]  # on this machine
    assert paramserver("cancel", "waiting").code == 0


def test_cluster_that_would_be_open_to_the_network_does_not_start(paramserver: Callable[..., Any]) -> None:
    refused = paramserver("up", "--shards", 1, "--workers", 1, "--http", "0.0.0.0:0")
    assert refused.code == 1
    assert "--token-file FILE" in refused.err


def test_unusable_token_file_is_refused_before_anything_starts(paramserver: Callable[..., Any], tmp_path: Path) -> None:
    refused = paramserver("up", "--token-file", tmp_path / "nothing")
    assert refused.code == 2
    assert "No such file" in refused.err
    assert not (paramserver.home / "logs").exists()  # type: ignore[attr-defined]
