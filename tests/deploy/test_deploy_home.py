"""One cluster a machine: the lock lives exactly as long as its holder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.detached import check_port, take_down
from deploy.home import Home, HomeError, Record, default_home
from deploy.local import EngineError

RECORD = Record(pid=4242, state="ready", url="http://127.0.0.1:8420", shards=2, workers=2)


def test_a_second_holder_is_refused_with_pid_url_and_mend(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    lock = home.acquire()
    home.write(RECORD)
    with pytest.raises(HomeError) as caught:
        home.acquire()
    os.close(lock)
    for part in ("4242", "http://127.0.0.1:8420", "paramserver down"):
        assert part in str(caught.value)


def test_a_record_counts_only_while_the_lock_is_held(tmp_path: Path) -> None:
    home = Home(tmp_path)
    lock = home.acquire()
    home.write(RECORD)
    assert home.record() == RECORD
    os.close(lock)
    assert home.record_path.exists()
    assert home.record() is None


def test_a_new_holder_forgets_what_a_crashed_one_wrote(tmp_path: Path) -> None:
    home = Home(tmp_path)
    lock = home.acquire()
    home.write(RECORD)
    os.close(lock)
    lock = home.acquire()
    assert home.record() is None
    os.close(lock)


def test_a_killed_holder_frees_the_lock(tmp_path: Path, processes: object, poll: Callable[..., Any]) -> None:
    home = Home(tmp_path)
    lock = home.acquire()
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(lock,))
    os.close(lock)
    assert home.is_held()
    holder.kill()
    holder.wait()
    assert not home.is_held()


def test_a_damaged_record_is_no_record(tmp_path: Path) -> None:
    home = Home(tmp_path)
    lock = home.acquire()
    for text in ("", "{", "[]", '{"pid": 1, "state": "ready", "colour": "red"}'):
        home.record_path.write_text(text)
        assert home.record() is None
    os.close(lock)


def test_a_home_that_is_no_folder_is_told_with_its_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HomeError, match="set PARAMSERVER_HOME"):
        Home(tmp_path / "file").acquire()


def test_the_environment_names_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PARAMSERVER_HOME", str(tmp_path))
    assert default_home().directory == tmp_path
    monkeypatch.delenv("PARAMSERVER_HOME")
    assert default_home().directory == Path.home() / ".paramserver"


def test_nothing_to_take_down_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no cluster runs on this machine"):
        take_down(Home(tmp_path))


@pytest.mark.parametrize("address", ["8420", "localhost:", ":8420", "127.0.0.1:http", "127.0.0.1:99999"])
def test_what_is_no_address_is_told(address: str) -> None:
    with pytest.raises(EngineError, match="is no HOST:PORT"):
        check_port(address)


def test_a_port_that_is_taken_is_told_with_the_option_that_mends_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(EngineError, match=f"{address} cannot be listened on: .*--http"):
            check_port(address)
    check_port("127.0.0.1:0")
