"""The folder of a run: whole, or not there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from paramserver.coordinator.runs import RunFolder


def test_folder_that_cannot_be_filled_leaves_its_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = RunFolder(tmp_path)

    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("os.fsync", no_room)
        with pytest.raises(OSError, match="No space left"):
            runs.open("job", '{"name": "job"}')
    assert not runs.is_taken("job")
    runs.open("job", '{"name": "job"}')
    assert (tmp_path / "job" / "job.yaml").read_text() == "name: job\n"
