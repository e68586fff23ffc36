"""Commands that need no cluster: what they print, where, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from deploy.home import DeathNote, Home, Record
from paramserver.cli import figures
from paramserver.cli.__main__ import main
from paramserver.cli.cluster import note_deaths
from paramserver.coordinator.effects import JobRecord
from paramserver.coordinator.report import empty_result

Job = Callable[..., Path]
Capture = pytest.CaptureFixture[str]

REFUSED = [
    ("nme: x", "nme: unknown field; did you mean 'name'?"),
    ("model: [", "not readable as YAML"),
    ("", "is a mapping of fields"),
]


def test_help_and_errors_of_usage_import_nothing_heavy() -> None:
    code = (
        "import sys; from paramserver.cli.__main__ import main; main(['--help']); main(['up', '--help']);"
        "heavy = {'torch', 'numba', 'numpy', 'zmq', 'yaml', 'httpx', 'fastapi'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "submit" in done.stdout


def test_validate_imports_no_torch(tiny_job: Job) -> None:
    code = (
        "import sys; from paramserver.cli.__main__ import main; code = main(['validate', sys.argv[1]]);"
        "sys.exit('imported torch' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_job())], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_validate_prints_what_a_job_resolves_to(tiny_job: Job, capsys: Capture) -> None:
    path = tiny_job()
    assert main(["validate", str(path)]) == 0
    shown = capsys.readouterr()
    assert "encoding int4, tile 64" in shown.out
    assert "is a valid job, and its data is here" in shown.out
    assert shown.err == ""
    assert main(["validate", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["job"]["optimizer"]["name"] == "adagrad"


def test_a_warning_goes_to_standard_error_and_does_not_fail(tiny_job: Job, capsys: Capture) -> None:
    path = tiny_job(workers=2)
    path.write_text(path.read_text() + "optimizer: {name: sgd}\n")
    assert main(["validate", str(path)]) == 0
    assert "warning" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), REFUSED)
@pytest.mark.parametrize("command", ["validate", "run", "submit"])
def test_a_wrong_job_is_one_message_with_the_file_and_exit_code_2(
    command: str, text: str, message: str, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert main([command, str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"paramserver: {path}: ")
    assert message in shown.err


@pytest.mark.parametrize("command", ["validate", "run"])
def test_missing_data_is_told_before_anything_starts(
    command: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PARAMSERVER_DATA", raising=False)
    path = tmp_path / "ptb.yaml"
    path.write_text("name: ptb\nmodel: {family: recurrent, args: {task: word-lm}}\ndata: {name: ptb}\n")
    assert main([command, str(path)]) == 2
    assert "PARAMSERVER_DATA is not set" in capsys.readouterr().err


@pytest.mark.parametrize(("field", "found", "most"), [("shards", 65, 64), ("workers", 257, 256)])
def test_run_starts_no_more_processes_than_a_machine_is_asked_for(
    field: str, found: int, most: int, tiny_job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: pytest.fail("something was started"))
    path = tiny_job("wide", **{field: found})
    assert main(["run", str(path)]) == 2
    assert f"cluster.{field}: found {found}, but `run` starts at most {most}" in capsys.readouterr().err


def test_up_refuses_a_data_root_that_is_no_folder(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAMSERVER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("deploy.detached.bring_up", lambda *_: pytest.fail("a cluster was started"))
    (tmp_path / "file").touch()
    for root in (tmp_path / "absent", tmp_path / "file"):
        assert main(["up", "--data-root", str(root)]) == 2
        assert f"--data-root '{root}': there is no such folder" in capsys.readouterr().err


def test_a_missing_file_is_told(tmp_path: Path, capsys: Capture) -> None:
    assert main(["validate", str(tmp_path / "absent.yaml")]) == 2
    assert "there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "submit"])
def test_an_empty_checkpoint_to_go_on_from_does_not_begin_from_nothing(
    command: str, tiny_job: Job, capsys: Capture
) -> None:
    """`--from "$CHECKPOINT"` of a script whose variable is not set."""
    assert main([command, str(tiny_job()), "--from", ""]) == 2
    assert "--from is empty: name RUN or RUN/N" in capsys.readouterr().err


def test_an_unknown_option_is_told_with_exit_code_2(capsys: Capture) -> None:
    assert main(["up", "--shard", "2"]) == 2
    assert "--shard" in capsys.readouterr().err
    assert main(["nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(("engine", "part"), [("compose", "not supported yet"), ("k8s", "not known")])
def test_another_engine_is_refused(engine: str, part: str, capsys: Capture) -> None:
    assert main(["up", "--engine", engine]) == 2
    assert part in capsys.readouterr().err


def test_schema_is_json(capsys: Capture) -> None:
    assert main(["schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)


def test_data_list_says_what_is_here_and_how_to_get_the_rest(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARAMSERVER_DATA", raising=False)
    assert main(["data", "list"]) == 0
    shown = capsys.readouterr().out
    assert "python-source  here" in shown
    assert "ptb            not here" in shown
    assert "mnist          not here" in shown
    assert "set PARAMSERVER_DATA" in shown
    assert main(["data", "list", "--json"]) == 0
    assert {"name", "what", "where", "is_here", "how"} == set(json.loads(capsys.readouterr().out)[0])


@pytest.mark.parametrize("command", [["jobs"], ["status"], ["cancel", "x"], ["export", "x", "--to", "f"]])
def test_no_cluster_is_one_clear_message(
    command: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAMSERVER_HOME", str(tmp_path))
    monkeypatch.delenv("PARAMSERVER_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    assert "no cluster runs on this machine" in capsys.readouterr().err
    monkeypatch.setenv("PARAMSERVER_URL", "http://127.0.0.1:1")
    assert main(command) == 1
    assert "no coordinator answers at http://127.0.0.1:1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class OtherRelease(BaseHTTPRequestHandler):
    """A coordinator whose answers have none of the fields that this release reads, and that has a model."""

    def do_GET(self) -> None:
        body = b"weights" if self.path.endswith("/model") else b'[{"id": "x"}]' if "jobs" in self.path else b"{}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def other_release(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherRelease) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("PARAMSERVER_URL", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("command", "field"), [("status", "job"), ("jobs", "state")])
def test_an_answer_of_another_release_is_told_as_that(
    command: str, field: str, other_release: None, capsys: Capture
) -> None:
    assert main([command]) == 1
    shown = capsys.readouterr().err
    assert f"has no '{field}': it is of another release" in shown
    assert "fault of the program" not in shown


@pytest.mark.parametrize("place", ["absent/x", "file/x", "/dev/null", "/proc/x", "x" * 300])
def test_an_export_to_a_place_that_cannot_be_written_is_wrong_input_and_leaves_nothing(
    place: str, other_release: None, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["export", "x", "--to", place]) == 2
    assert f"--to {place}: " in capsys.readouterr().err
    assert Path("/dev/null").is_char_device()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_export_replaces_a_file_whole_and_touches_no_other(
    other_release: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.safetensors").write_text("old")
    (tmp_path / "x.safetensors.part").write_text("mine")
    assert main(["export", "x", "--to", "."]) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "x.safetensors": "weights", "x.safetensors.part": "mine",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("outcome", "mend"),
    [("given up", "`paramserver down`, then `paramserver up`"), ("died", "ask once more in a moment")],
)
def test_a_dead_coordinator_is_told_as_that(
    outcome: str, mend: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAMSERVER_HOME", str(tmp_path))
    monkeypatch.delenv("PARAMSERVER_URL", raising=False)
    home = Home(tmp_path)
    lock = home.acquire()
    try:
        death = DeathNote(name="coordinator", reason="was killed (SIGKILL)", at="noon", outcome=outcome)
        home.write(Record(1, "ready", url="http://127.0.0.1:1", deaths=[death]))
        assert main(["status"]) == 1
    finally:
        os.close(lock)
    shown = capsys.readouterr().err
    assert "the coordinator was killed (SIGKILL) at noon" in shown
    assert mend in shown


def test_a_death_is_told_until_it_is_made_good_and_a_minute_longer(capsys: Capture) -> None:
    now = datetime.now(UTC)
    deaths = [
        DeathNote(name=name, reason="was killed (SIGKILL)", at=(now - ago).isoformat(), outcome=outcome)
        for name, ago, outcome in (
            ("shard-0", timedelta(seconds=90), "started again"),
            ("shard-1", timedelta(seconds=90), "given up"),
            ("worker-0", timedelta(seconds=90), "died"),
            ("worker-1", timedelta(seconds=90), "given up"),
            ("worker-1", timedelta(seconds=5), "started again"),
        )
    ]
    note_deaths(Record(1, "ready", deaths=deaths))
    shown = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in shown] == ["shard-1", "worker-0", "worker-1"]
    assert "is not started again" in shown[0]
    assert "about to be started again" in shown[1]
    assert shown[2].endswith("started again")
    note_deaths(None)
    assert capsys.readouterr().err == ""


def test_an_address_that_is_none_is_told(capsys: Capture) -> None:
    assert main(["status", "--url", "nonsense"]) == 1
    assert "nonsense" in capsys.readouterr().err


def test_down_and_logs_without_a_cluster_say_so(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAMSERVER_HOME", str(tmp_path))
    assert main(["down"]) == 1
    assert "no cluster runs" in capsys.readouterr().err
    assert main(["logs"]) == 2
    assert "no logs in" in capsys.readouterr().err


def test_logs_of_several_processes_are_merged_by_time(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAMSERVER_HOME", str(tmp_path))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").write_text("1 first\nTraceback\n  cause\n3 third\nhalf a li")
    (tmp_path / "logs" / "b.log").write_text("2 second\n")
    assert main(["logs"]) == 0
    assert capsys.readouterr().out == "1 first\nTraceback\n  cause\n2 second\n3 third\n"
    assert main(["logs", "b"]) == 0
    assert capsys.readouterr().out == "2 second\n"
    assert main(["logs", "c"]) == 2
    assert "there are: a, b" in capsys.readouterr().err


def test_an_unexpected_error_shows_no_traceback_unless_asked(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("the schema is broken")

    monkeypatch.setattr("paramserver.job.job_schema", broken)
    assert main(["schema"]) == 1
    shown = capsys.readouterr().err
    assert "unexpected RuntimeError: the schema is broken" in shown
    assert "Traceback" not in shown
    with pytest.raises(RuntimeError):
        main(["--debug", "schema"])


def test_a_job_that_failed_before_its_first_step_shows_no_empty_figures() -> None:
    record = JobRecord("x", 1, "{}", (), "today", state="failed", reason="more shards than blocks")
    assert figures.result_rows(empty_result(record)) == [
        ("state", "failed: more shards than blocks"),
        ("time", "0.0 s"),
    ]
    trained = {**empty_result(record), "steps": 3, "workers_lost": ["worker-1"]}
    assert {"steps", "examples", "pushed", "workers lost"} <= {name for name, _ in figures.result_rows(trained)}


def test_losses_are_told_in_the_familys_unit_with_the_tasks_own_metrics() -> None:
    record = JobRecord("x", 1, "{}", (), "today", state="done")
    loss = {"loss": 0.5, "bits": 0.7213, "perplexity": 1.6487}
    images = {
        **empty_result(record),
        "unit": "nats",
        "symbol": "image",
        "test": {**loss, "metrics": {"accuracy": 0.97812}},
    }
    images["replica"] = {**images["replica"], "test": images["test"]}
    rows = dict(figures.result_rows(images))
    assert rows["test loss"] == rows["test loss of the replica"] == "0.5000 nats an image, accuracy 0.9781"
    text = {**empty_result(record), "unit": "bits", "symbol": "character", "test": {**loss, "metrics": {}}}
    assert dict(figures.result_rows(text))["test loss"] == "0.7213 bits a character, perplexity 1.649"


def test_ctrl_c_while_commands_are_imported_shows_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = entry_points(group="console_scripts", name="paramserver")
    code = (
        "import sys; from importlib.metadata import EntryPoint\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        f"sys.exit(EntryPoint('x', {script.value!r}, 'y').load()())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_byte_sizes_are_short() -> None:
    assert [figures.byte_size(size) for size in (0, 999, 1500, 2_000_000, 3.2e12)] == [
        "0 B", "999 B", "1.5 kB", "2.0 MB", "3200.0 GB",
    ]  # fmt: skip
