"""Data sets: the same text everywhere, parts that share nothing, and clear words where a text is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.datasets import ptb, python_source, shakespeare, text_file, vocabulary
from models.datasets.catalogue import catalogue
from models.datasets.errors import DataError
from models.datasets.folder import VARIABLE
from models.datasets.text import Splits, split_by_position
from models.recurrent.arguments import RecurrentArguments, RecurrentData
from models.recurrent.corpus import find_data, load_corpus
from models.task import DataError as TaskDataError


def test_there_is_one_data_error() -> None:
    assert TaskDataError is DataError


# ------------------------------------------------------------------------------- python-source


def test_python_source_is_the_same_in_every_process() -> None:
    script = (
        "import hashlib; from models.datasets.python_source import read; s = read(300_000)\n"
        "print(hashlib.sha256((s.train + s.valid + s.test).encode()).hexdigest())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True, text=True, timeout=60, check=True, env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(told) == 1
    assert len(told.pop().strip()) == 64


def test_python_source_keeps_its_limits() -> None:
    splits = python_source.read(400_000)
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (400_000, 20_000, 20_000)
    assert len(python_source.read().train) == python_source.DEFAULT_MAX_CHARS


def test_python_source_has_a_vocabulary_of_98_on_every_machine() -> None:
    corpus = load_corpus(RecurrentArguments(task="char-lm"), RecurrentData(max_chars=200_000))
    assert len(corpus.vocabulary) == 98
    assert corpus.vocabulary.symbols[:3] == ("\t", "\n", " ")
    unknown = (corpus.streams["train"] == corpus.vocabulary.unknown).mean()
    assert unknown < 0.001


def _library(folder: Path, files: int = 120) -> Path:
    for number in range(files):
        (folder / f"module_{number}.py").write_text(f"# {number:05}\n" * 500)
    return folder


def test_python_source_splits_by_file(tmp_path: Path) -> None:
    splits = python_source.read(10**9, _library(tmp_path))
    seen = [set(text.split()) - {"#"} for text in (splits.train, splits.valid, splits.test)]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 120
    assert len(seen[0]) > 90
    assert min(len(seen[1]), len(seen[2])) >= 1


def test_python_source_skips_tests_and_installed_packages(tmp_path: Path) -> None:
    _library(tmp_path)
    for skipped in ("test", "idlelib/idle_test", "site-packages/x", "config-3.11"):
        (tmp_path / skipped).mkdir(parents=True)
        (tmp_path / skipped / "module.py").write_text("SKIPPED\n")
    (tmp_path / "_sysconfigdata__linux.py").write_text("SKIPPED\n")
    splits = python_source.read(10**9, tmp_path)
    assert "SKIPPED" not in splits.train + splits.valid + splits.test


def test_one_long_file_is_cut(tmp_path: Path) -> None:
    (_library(tmp_path) / "long.py").write_text("~" * 200_000)
    splits = python_source.read(10**9, tmp_path)
    assert (splits.train + splits.valid + splits.test).count("~") == python_source.MAX_FILE_CHARS


def test_an_interpreter_without_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="python-source.*0 characters.*text-file"):
        python_source.find(tmp_path)
    with pytest.raises(DataError, match="python-source"):
        python_source.read(folder=tmp_path)


# ------------------------------------------------------------------------------------ text-file


def test_text_file_is_split_90_5_5_without_loss(tmp_path: Path) -> None:
    text = "".join(f"{number:06}\r\n" for number in range(1000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    splits = text_file.read(str(tmp_path / "a.txt"))
    assert splits.train + splits.valid + splits.test == text
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (7200, 400, 400)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no such file"),
        (b"x" * 999, "999 characters; at least 1000"),
        (b"x" * 1500 + b"\xe9 " * 9, "not UTF-8: byte 0xe9 at offset 1500.*iconv"),
    ],
)
def test_a_wrong_text_file_is_told_by_name(tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=told) as caught:
        find_data(RecurrentData(name="text-file", path=str(path)))
    assert str(path) in str(caught.value)


def test_a_folder_is_no_text_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        text_file.read(str(tmp_path))


def test_what_may_have_no_end_is_no_text_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match="a device or a pipe"):
            text_file.read(str(path))


def test_a_text_shorter_than_a_segment_names_the_sizes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 300)
    data = RecurrentData(name="text-file", path=str(tmp_path / "a.txt"), window=512, windows=4)
    with pytest.raises(DataError, match="train part has 1080 symbols, at least 2049.*window 512 x windows 4"):
        load_corpus(RecurrentArguments(task="char-lm"), data)


# ---------------------------------------------------------------------------------- published


@pytest.mark.data
@pytest.mark.usefixtures("data_root")
def test_ptb_has_its_published_counts() -> None:
    corpus = load_corpus(RecurrentArguments(task="word-lm"), RecurrentData(name="ptb"))
    assert {name: len(stream) for name, stream in corpus.streams.items()} == {
        "train": 929_589,
        "valid": 73_760,
        "test": 82_430,
    }
    assert len(corpus.vocabulary) == 10_000
    assert corpus.vocabulary.symbols[0] == "the"
    assert corpus.vocabulary.symbols[corpus.vocabulary.unknown or 0] == "<unk>"
    assert set(np.unique(corpus.streams["train"])) == set(range(10_000))


@pytest.mark.data
@pytest.mark.usefixtures("data_root")
def test_ptb_characters_are_the_text_itself() -> None:
    corpus = load_corpus(RecurrentArguments(task="char-lm"), RecurrentData(name="ptb"))
    assert len(corpus.streams["train"]) == 5_101_618
    assert (len(corpus.vocabulary), corpus.vocabulary.unknown) == (50, None)


@pytest.mark.data
@pytest.mark.usefixtures("data_root")
def test_shakespeare_has_65_characters_and_no_unknown() -> None:
    corpus = load_corpus(RecurrentArguments(task="char-lm"), RecurrentData(name="shakespeare"))
    assert (len(corpus.vocabulary), corpus.vocabulary.unknown) == (65, None)
    assert sum(map(len, corpus.streams.values())) == 1_115_394
    assert len(corpus.streams["train"]) == 1_115_394 * 90 // 100


@pytest.mark.parametrize("name", ["ptb", "shakespeare"])
def test_missing_data_says_where_it_was_sought(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match=f"{name}.*no file {tmp_path}.*set PARAMSERVER_DATA"):
        find_data(RecurrentData(name=name))
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(DataError, match="PARAMSERVER_DATA is not set"):
        find_data(RecurrentData(name=name))


def test_a_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    (tmp_path / shakespeare.FILE).parent.mkdir()
    (tmp_path / shakespeare.FILE).write_bytes(b"no xz")
    with pytest.raises(DataError, match="tinyshakespeare.*not readable as xz"):
        shakespeare.read()


def test_the_catalogue_tells_what_is_here_and_how_to_get_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    for relative in ptb.FILES.values():
        (tmp_path / relative).parent.mkdir(exist_ok=True)
        (tmp_path / relative).touch()
    listed = {one.name: one for one in catalogue()}
    assert {name for name, one in listed.items() if one.is_here} == {"python-source", "ptb", "text-file", "digits"}
    assert "'digits'" in listed["mnist"].how
    assert "set PARAMSERVER_DATA" in listed["shakespeare"].how
    assert listed["shakespeare"].where == f"{tmp_path}/{shakespeare.FILE}"


# --------------------------------------------------------------------------------- vocabulary


def test_limits_keep_the_first_characters_of_each_part() -> None:
    splits = Splits("a" * 100, "b" * 100, "c" * 3).limited(60)
    assert splits == Splits("a" * 60, "bbb", "ccc")
    assert split_by_position("x" * 40).limited(None) == Splits("x" * 36, "xx", "xx")


def test_words_are_counted_with_one_eos_a_line() -> None:
    assert vocabulary.split_words(" the cat \n\n sat\n") == ["the", "cat", "<eos>", "<eos>", "sat", "<eos>"]
    assert vocabulary.split_words("no end") == ["no", "end", "<eos>"]


def test_rare_words_become_unknown() -> None:
    known = vocabulary.words(["a", "a", "b", "b", "c", "d"], limit=3)
    assert set(known.symbols) == {"a", "b", "<unk>"}
    assert [known.symbols[number] for number in known.encode(["c", "b", "zzz"])] == ["<unk>", "b", "<unk>"]


def test_a_rare_unknown_of_the_text_itself_survives_the_limit() -> None:
    assert set(vocabulary.words(["a", "a", "b", "b", "<unk>"], limit=2).symbols) == {"a", "<unk>"}


def test_unknown_is_added_only_where_needed() -> None:
    assert vocabulary.words(["a", "b"], 9, [["a"]]).unknown is None
    assert vocabulary.words(["a", "b"], 9, [["z"]]).unknown is not None
    assert vocabulary.characters("ba", ["a"]).symbols == ("a", "b")
    assert vocabulary.characters("ba", ["az"]).symbols == ("a", "b", "<unk>")


def test_characters_beyond_the_basic_plane_are_single_symbols() -> None:
    known = vocabulary.characters("aé😀")
    assert known.encode("😀aé").tolist() == [2, 0, 1]
    with pytest.raises(KeyError, match="z"):
        known.encode("az")


def test_the_rarest_characters_are_dropped_beyond_the_limit() -> None:
    many = "".join(map(chr, range(0x4E00, 0x4E00 + vocabulary.MAX_CHARACTERS)))
    known = vocabulary.characters(many * 2 + "!")
    assert len(known) == vocabulary.MAX_CHARACTERS + 1
    assert known.encode("!").tolist() == [known.unknown]
