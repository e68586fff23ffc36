"""`chaos` refuses what it can prove nothing of before it starts anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.chaos.campaign import Campaign
from paramserver.cli.__main__ import main

Job = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


def test_a_job_that_cannot_be_counted_is_refused(tiny_job: Job, capsys: Capture) -> None:
    path = tiny_job()
    path.write_text(path.read_text() + "consistency: {mode: sync}\n")
    assert main(["chaos", "--job", str(path)]) == 2
    shown = capsys.readouterr().err
    assert str(path) in shown
    assert "consistency.mode: found 'sync', chaos needs 'async' or 'bounded'" in shown


def test_a_job_file_that_is_wrong_is_told_as_everywhere(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("nme: x\n")
    assert main(["chaos", "--job", str(path)]) == 2
    assert "nme: unknown field" in capsys.readouterr().err


def test_more_stalls_than_faults_are_refused(capsys: Capture) -> None:
    assert main(["chaos", "--faults", "3", "--stalls", "4"]) == 2
    assert "--stalls: found 4, from 0 to the 3 faults are allowed" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_not_used(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine").write_text("x")
    assert main(["chaos", "--keep", str(tmp_path)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_report_that_could_not_be_written_is_told_before_the_run(tmp_path: Path, capsys: Capture) -> None:
    assert main(["chaos", "--out", str(tmp_path / "none" / "report.json")]) == 2
    assert "there is no folder for it" in capsys.readouterr().err


def test_a_folder_is_no_file_for_the_report(tmp_path: Path, capsys: Capture) -> None:
    assert main(["chaos", "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_after_all_is_shown_all_the_same(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder may go while the campaign runs, which takes minutes."""
    (tmp_path / "reports").mkdir()

    def run(self: Campaign, stop: object, tell: object) -> dict[str, object]:
        (tmp_path / "reports").rmdir()
        return {"failures": []}

    monkeypatch.setattr(Campaign, "run", run)
    out = tmp_path / "reports" / "report.json"
    assert main(["chaos", "--json", "--keep", str(tmp_path / "kept"), "--out", str(out)]) == 1
    shown = capsys.readouterr()
    assert '"failures": []' in shown.out
    assert "report.json': cannot be written: No such file or directory" in shown.err
