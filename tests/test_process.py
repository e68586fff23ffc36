"""Log lines can be split again, and a process stops by signal or when its parent is gone."""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from paramserver import process

STOPPING = """
import sys
from paramserver.process import install_stop
stop = install_stop()
print("ready", flush=True)
while not stop.wait(0.2):
    pass
print(stop.reason, flush=True)
"""


@pytest.fixture(autouse=True)
def _no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_identity", {})


def test_a_log_line_is_one_line_of_fields_that_split_again(capsys: pytest.CaptureFixture[str]) -> None:
    process.identify("shard", "shard-0")
    process.log("refused", level="warning", code="wrong-size", detail='found "3"\nbytes = 4', seconds=0.123456789)
    written = capsys.readouterr().err
    assert written.count("\n") == 1
    stamp, *fields = shlex.split(written)
    assert stamp.endswith("Z")
    assert dict(field.split("=", 1) for field in fields) == {
        "level": "warning",
        "role": "shard",
        "name": "shard-0",
        "event": "refused",
        "code": "wrong-size",
        "detail": 'found "3"\\nbytes = 4',
        "seconds": "0.123457",
    }


def test_an_empty_value_is_visible_in_a_log_line(capsys: pytest.CaptureFixture[str]) -> None:
    process.log("stopped", reason="")
    assert 'reason=""' in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_line_that_finds_no_room_is_lost_and_its_process_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs and journals are on one disk, as a rule: a shard whose journal finds no room must be able to wait for it."""
    full = Path("/dev/full").open("w", encoding="utf-8", buffering=1)  # noqa: SIM115  (closing it fails, too)
    monkeypatch.setattr(sys, "stderr", full)
    with pytest.raises(OSError, match="No space left"):
        full.write("a line\n")
    process.log("journal", level="error", state="cannot write")
    with suppress(OSError):  # what it still holds
        full.close()


def test_the_first_reason_to_stop_is_kept() -> None:
    stop = process.StopRequest()
    assert not stop.is_set()
    assert not stop.wait(0.0)
    stop.set("SIGTERM")
    stop.set("SIGINT")
    assert stop.is_set()
    assert stop.wait(0.0)
    assert stop.reason == "SIGTERM"


def _start(**options: object) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", STOPPING], stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_stop_request(number: signal.Signals) -> None:
    child = _start()
    child.send_signal(number)
    assert child.communicate(timeout=20)[0] == f"{number.name}\n"
    assert child.returncode == 0


def test_a_process_stops_when_its_parent_is_gone() -> None:
    reader, writer = os.pipe()
    try:
        child = _start(pass_fds=(reader,), env={**os.environ, process.LIFELINE_VARIABLE: str(reader)})
    finally:
        os.close(reader)
    assert not select.select([child.stdout], [], [], 0.5)[0], "it must not stop while the parent holds the pipe"
    os.close(writer)
    assert child.communicate(timeout=20)[0] == "the parent process is gone\n"
    assert child.returncode == 0


def test_a_process_that_hangs_ends_by_force_when_its_parent_is_gone(tmp_path: Path) -> None:
    hanging = (
        "import threading\nfrom paramserver import process\nprocess.GRACE_SECONDS = 0.2\nprocess.install_stop()\n"
        "print('ready', flush=True)\nwhile True:\n    threading.Event().wait(60)\n"
    )
    reader, writer = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-c", hanging],
            stdout=subprocess.PIPE,
            pass_fds=(reader,),
            env={**os.environ, process.LIFELINE_VARIABLE: str(reader)},
        )
    finally:
        os.close(reader)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    os.close(writer)
    child.communicate(timeout=20)
    assert child.returncode == 1
