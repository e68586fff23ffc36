"""The schemas refuse what cannot work, with a text that names the fields; nothing here needs torch."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from pydantic import ValidationError

from models.recurrent.arguments import RecurrentArguments, RecurrentData
from models.recurrent.family import FAMILY


def test_defaults_are_a_whole_job() -> None:
    arguments, data = FAMILY.check({"task": "char-lm"}, {})
    assert isinstance(arguments, RecurrentArguments)
    assert isinstance(data, RecurrentData)
    assert (arguments.cell, arguments.hidden, arguments.embedding_width, arguments.layers) == ("lstm", 200, 200, 1)
    assert (data.name, data.batch, data.window, data.segment) == ("python-source", 16, 64, 64 * data.windows)


def test_resolved_arguments_check_to_themselves() -> None:
    arguments = RecurrentArguments(task="word-lm", tied=True, vocabulary=50)
    data = RecurrentData(name="text-file", path="x.txt", max_chars=5000)
    assert FAMILY.check(arguments.model_dump(mode="json"), data.model_dump(mode="json")) == (arguments, data)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, ["task", "Field required"]),
        ({"task": "chars"}, ["task", "'char-lm' or 'word-lm'"]),
        ({"task": "char-lm", "cell": "elman"}, ["cell", "'rnn', 'lstm' or 'gru'"]),
        ({"task": "char-lm", "hiden": 3}, ["hiden", "Extra inputs"]),
        ({"task": "char-lm", "hidden": 0}, ["hidden", "greater than or equal to 1"]),
        ({"task": "char-lm", "layers": 1.5}, ["layers", "integer"]),
        ({"task": "char-lm", "init_scale": float("nan")}, ["init_scale", "finite"]),
        (
            {"task": "char-lm", "tied": True, "embedding": 64, "hidden": 128},
            ["embedding 64", "hidden 128", "tied: false"],
        ),
        ({"task": "char-lm", "vocabulary": 100}, ["vocabulary", "'word-lm'", "'char-lm'"]),
    ],
)
def test_wrong_arguments_are_refused_by_name(given: dict[str, object], told: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        RecurrentArguments.model_validate(given)
    for part in told:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"name": "wikitext"}, ["name", "'python-source', 'ptb', 'shakespeare' or 'text-file'"]),
        ({"name": "text-file"}, ["'text-file' needs path"]),
        ({"name": "ptb", "path": "a.txt"}, ["path belongs to name 'text-file'", "'ptb'"]),
        ({"batch": 0}, ["batch", "greater than or equal to 1"]),
        ({"max_chars": 10}, ["max_chars", "greater than or equal to 1000"]),
    ],
)
def test_wrong_data_is_refused_by_name(given: dict[str, object], told: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        RecurrentData.model_validate(given)
    for part in told:
        assert part in str(caught.value)


def test_checked_arguments_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        RecurrentArguments(task="char-lm").hidden = 3  # type: ignore[misc]


def test_a_job_is_checked_where_torch_is_not_installed() -> None:
    script = """
        import importlib, sys

        class NoTorch:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "torch":
                    raise ModuleNotFoundError("torch is blocked in this test")

        sys.meta_path.insert(0, NoTorch())
        from models.recurrent.family import FAMILY
        from models.datasets.catalogue import catalogue

        arguments, data = FAMILY.check({"task": "char-lm"}, {"name": "python-source"})
        module, _, function = FAMILY.find_data.partition(":")
        getattr(importlib.import_module(module), function)(data)
        known = {"python-source", "ptb", "shakespeare", "mnist", "digits", "text-file"}
        assert {one.name for one in catalogue()} == known
        module, _, function = FAMILY.task.partition(":")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            print("blocked:", error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "blocked: torch is blocked in this test\n"
