"""What the code may not do at all, read from the code itself; and which model code may be loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from paramserver import families as families_module
from paramserver.coordinator.submission import check_submission
from paramserver.families import FamiliesError, allow_families, families
from paramserver.job import JobError, _StrictLoader
from worker import __main__ as worker_main

ROOT = Path(__file__).parents[1]
PACKAGES = ("paramserver", "worker", "models", "deploy")
# Modules that run code which is in their input, or make such input.
IMPORTS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {("torch", "load"), ("os", "system"), ("os", "popen"), ("yaml", "unsafe_load"), ("yaml", "full_load")}
KEYWORDS = {"shell", "allow_pickle"}
JOB = "name: j\nmodel: {family: recurrent, args: {task: char-lm}}\n"


def faults(source: str) -> list[str]:
    """What a module does that no module of ours may do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"line {node.lineno}: imports {name}" for name in names if name.partition(".")[0] in IMPORTS]
        if not isinstance(node, ast.Call):
            continue
        call = node.func
        if isinstance(call, ast.Name) and call.id in CALLS:
            found.append(f"line {node.lineno}: calls {call.id}")
        if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name):
            name = (call.value.id, call.attr)
            loader = [ast.unparse(argument) for argument in node.args[1:]]
            if name in ATTRIBUTES or (name == ("yaml", "load") and loader != ["_StrictLoader"]):
                found.append(f"line {node.lineno}: calls {'.'.join(name)}")
        found += [f"line {node.lineno}: {word.arg}=" for word in node.keywords if word.arg in KEYWORDS]
    return found


def test_nothing_runs_code_that_is_in_its_input() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    wrong = {str(path.relative_to(ROOT)): faults(path.read_text(encoding="utf-8")) for path in files}
    assert {path: found for path, found in wrong.items() if found} == {}
    assert issubclass(_StrictLoader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import os, marshal", "eval('1')", "exec(x)", "__import__(x)",
        "torch.load(x)", "os.system(x)", "yaml.load(x)", "yaml.load(x, yaml.Loader)", "np.load(x, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_searches_for(source: str) -> None:
    assert faults(source)


@pytest.fixture
def any_family() -> Iterator[None]:
    yield
    allow_families(())


def test_family_that_is_not_allowed_is_not_even_imported(any_family: None, monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []

    class Point:
        def __init__(self, name: str) -> None:
            self.name = name

        def load(self) -> str:
            imported.append(self.name)
            return f"the family {self.name}"

    monkeypatch.setattr(families_module, "entry_points", lambda group: [Point("good"), Point("bad")])
    allow_families(["good"])
    assert families() == {"good": "the family good"}  # type: ignore[comparison-overlap]
    assert imported == ["good"]
    with pytest.raises(JobError, match=r"unknown family 'bad'.*known: good; not allowed here: bad"):
        check_submission("name: j\nmodel: {family: bad}\n", [])
    with pytest.raises(FamiliesError, match=r"no model family 'worse' here \(installed: bad, good\)"):
        allow_families(["worse"])
    assert set(families()) == {"good"}


def test_without_a_list_every_installed_family_is_allowed(any_family: None) -> None:
    allow_families(())
    assert check_submission(JOB, []).model.family == "recurrent"


def test_processes_refuse_to_start_with_a_family_that_is_not_installed(tmp_path: Path) -> None:
    where = ["--runs", "runs", "--state", "state", "--ready-file", "ready.json"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "paramserver.coordinator", *where, "--allow-family", "nothing"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no model family 'nothing'" in done.stderr
    assert worker_main.parse(["--coordinator", "x", "--name", "w", "--allow-family", "a"]).allow_family == ["a"]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".x", "a\\\\b", "a\\nb", "", "x" * 65])
def test_name_of_a_job_is_a_folder_inside_the_runs(name: str) -> None:
    text = f'name: "{name}"\n' + JOB.partition("\n")[2]
    with pytest.raises(JobError, match="name"):
        check_submission(text, [])


def test_path_in_the_arguments_of_a_model_stays_inside_the_data_roots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paramserver.coordinator import submission

    job = submission._parse(JOB)
    job = job.model_copy(update={"model": job.model.model_copy(update={"args": {"start_path": "/etc/passwd"}})})
    monkeypatch.setattr(submission, "_parse", lambda text: job)
    with pytest.raises(JobError, match=r"model\.args\.start_path.*outside the data roots"):
        check_submission(JOB, [tmp_path])
