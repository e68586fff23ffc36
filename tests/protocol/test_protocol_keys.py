"""Key files and the allow-list: secrets stay secret, nothing is overwritten, a withdrawn key is gone."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

import pytest
import zmq
import zmq.auth
from hypothesis import given
from hypothesis import strategies as st

from paramserver.protocol import keys as keys_module
from paramserver.protocol.keys import Allowlist, KeysError, load_keys, make_keys, read_pair, read_public


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("coordinator", "worker-0"):
        make_keys(tmp_path / "keys", name)
    return tmp_path / "keys"


def test_secrets_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        secret = make_keys(tmp_path / "fresh" / "keys", "worker-0")
    finally:
        os.umask(before)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700
    public = secret.with_name("worker-0.key")
    assert read_pair(secret).secret not in public.read_text()
    assert read_public(public) == read_pair(secret).public


def test_keys_are_never_overwritten(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeysError, match=r"worker-0\.key is there already"):
        make_keys(folder, "worker-0")
    (folder / "worker-0.key").unlink()
    with pytest.raises(KeysError, match=r"worker-0\.key_secret is there already"):
        make_keys(folder, "worker-0")
    del before["worker-0.key"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "-x", "a b", "x" * 200, "\n"])
def test_name_that_would_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeysError, match="name"):
        make_keys(tmp_path, name)
    with pytest.raises(KeysError, match="name"):
        load_keys(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_files_are_certificates_as_pyzmq_reads_them(folder: Path) -> None:
    public, secret = zmq.auth.load_certificate(folder / "worker-0.key_secret")
    pair = read_pair(folder / "worker-0.key_secret")
    assert (public.decode(), secret and secret.decode()) == (pair.public, pair.secret)


def test_keys_of_a_process_are_its_own_the_coordinators_and_all_listed_ones(folder: Path, tmp_path: Path) -> None:
    keys = load_keys(folder, "worker-0")
    assert keys.own.public == read_public(folder / "worker-0.key")
    assert keys.coordinator == read_public(folder / "coordinator.key")
    assert keys.allowed.lets_in(keys.coordinator)
    assert keys.own.secret not in repr(keys)
    elsewhere = make_keys(tmp_path / "other", "x").with_name("x.key")
    assert load_keys(folder, "worker-0", elsewhere).coordinator == read_public(elsewhere)


def test_missing_and_unusable_files_are_named_with_the_mend(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeysError, match=r"worker-9\.key_secret.*paramserver keygen --to .* worker-9"):
        load_keys(folder, "worker-9")
    (folder / "worker-0.key_secret").chmod(0o640)
    with pytest.raises(KeysError, match="chmod 600"):
        load_keys(folder, "worker-0")
    (folder / "worker-0.key_secret").chmod(0o600)
    make_keys(tmp_path / "other", "coordinator")
    (folder / "coordinator.key").write_bytes((tmp_path / "other" / "coordinator.key").read_bytes())
    with pytest.raises(KeysError, match="not of one pair"):
        load_keys(folder, "coordinator")
    (folder / "coordinator.key").write_text("nonsense")
    with pytest.raises(KeysError, match=r"coordinator\.key: holds no public key"):
        load_keys(folder, "worker-0")


def test_pair_of_two_keys_that_do_not_belong_together_is_refused(folder: Path) -> None:
    other = zmq.curve_keypair()[0].decode()
    path = folder / "worker-0.key_secret"
    path.write_text(path.read_text().replace(read_pair(path).public, other))
    with pytest.raises(KeysError, match="not of one pair"):
        read_pair(path)


@given(st.binary(max_size=200))
def test_a_file_of_any_bytes_is_a_key_or_a_clear_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.key"
        for text in (
            content,
            b'public-key = "' + content + b'"',
            b'public-key = "' + content[:40].ljust(40, b"~") + b'"',
        ):
            path.write_bytes(text)
            with contextlib.suppress(KeysError):
                assert len(read_public(path)) == 40


def test_keys_are_added_and_withdrawn_while_the_process_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = Allowlist(folder, "own")
    key = read_public(folder / "worker-0.key")
    assert allowed.lets_in(key)
    assert allowed.lets_speak(key)
    (folder / "worker-0.key").unlink()
    assert not allowed.lets_in(key)
    assert not allowed.lets_speak(key)
    fresh = read_public(make_keys(folder, "worker-1").with_name("worker-1.key"))
    assert not allowed.lets_speak(fresh), "an open connection is looked at once a second"
    now = keys_module.monotonic() + keys_module.LOOK_SECONDS
    monkeypatch.setattr(keys_module, "monotonic", lambda: now)
    assert allowed.lets_speak(fresh)
    assert allowed.lets_in("own")


def test_a_file_that_is_no_key_lets_nobody_in_and_nobody_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    allowed = Allowlist(folder, "own")
    key = read_public(folder / "worker-0.key")
    (folder / "half.key").write_text('public-key = "abc')
    assert allowed.lets_in(key)
    assert not allowed.lets_in("abc")
    assert not allowed.lets_in("")
    assert capsys.readouterr().err.count("key-ignored") == 1


def test_a_pipe_among_the_keys_is_refused_and_never_waited_for(folder: Path) -> None:
    allowed = Allowlist(folder, "own")
    key = read_public(folder / "worker-0.key")
    os.mkfifo(folder / "pipe.key")
    # The other end: without it a fault would be a test that never ends.
    descriptor = os.open(folder / "pipe.key", os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(descriptor, (folder / "worker-0.key").read_bytes().ljust(keys_module.MAX_FILE_BYTES))
        with pytest.raises(KeysError, match="not a file but a pipe"):
            read_public(folder / "pipe.key")
        assert allowed.lets_in(key)
    finally:
        os.close(descriptor)


def test_a_folder_that_vanishes_leaves_the_list_as_it_was(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    allowed = Allowlist(folder, "own")
    key = read_public(folder / "worker-0.key")
    moved = folder.rename(folder.with_name("moved"))
    assert allowed.lets_in(key)
    assert allowed.lets_in(key)
    assert capsys.readouterr().err.count("keys-not-readable") == 1
    (moved / "worker-0.key").unlink()
    moved.rename(folder)
    assert not allowed.lets_in(key)


def test_an_allow_list_that_is_broken_at_the_start_is_an_error(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.key").write_text("")
    with pytest.raises(KeysError, match=r"broken\.key"):
        Allowlist(folder, "own")
    with pytest.raises(KeysError, match="cannot be read"):
        Allowlist(tmp_path / "nothing", "own")
