"""What a submitted job may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from paramserver.coordinator import submission
from paramserver.coordinator.submission import check_submission
from paramserver.job import JobError

JOB = "name: j\nmodel: {family: recurrent, args: {task: char-lm}}\n"


def with_path(path: object) -> str:
    return f"{JOB}data: {{name: text-file, path: {str(path)!r}}}\n"


def test_path_inside_a_data_root_becomes_absolute(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "text.txt").write_text("x")
    roots = [tmp_path / "a", tmp_path / "b"]
    for path in ("text.txt", tmp_path / "b" / "text.txt"):
        assert check_submission(with_path(path), roots).data["path"] == str(tmp_path / "b" / "text.txt")


def test_a_lease_of_too_many_examples_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "name: j\nmodel: {family: mlp}\ndata: {batch: 4096, batches: 256}\n"
    assert check_submission(text, []).data["batch"] == 4096
    monkeypatch.setattr(submission, "MAX_LEASE_EXAMPLES", 2**20 - 1)
    with pytest.raises(
        JobError, match="data: found 1048576 examples a lease; allowed are 1 to 1048575; change data.batch"
    ):
        check_submission(text, [])


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "link/passwd", "a/../../x"])
def test_path_outside_the_data_roots_is_refused(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    with pytest.raises(JobError, match=r"data\.path.*outside the data roots"):
        check_submission(with_path(path), [root])


def test_path_without_any_data_root_is_refused_with_the_mend() -> None:
    with pytest.raises(JobError, match="--data-root"):
        check_submission(with_path("text.txt"), [])


@pytest.mark.parametrize(
    "path",
    ["loop/x", "n" * 5000],
)
def test_unusable_path_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(JobError, match=r"data\.path"):
        check_submission(with_path(path), [tmp_path])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "a: &x [1, 1]\nb: [*x, *x]\n",
        "a: 2001-99-99",
        "\0",
        "- 1",
        "name: [",
        f"name: {'1' * 5000}",
        "{? {a: 1} : 2}",
        "",
    ],
)
def test_hostile_text_is_a_job_error(text: str) -> None:
    with pytest.raises(JobError):
        check_submission(text, [])
