"""The job specification: what is refused, in which words, and what survives being resolved."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from paramserver.families import families
from paramserver.job import Job, JobError, check_data, job_schema, load_job, parse_job, parse_job_text

SMALLEST: dict[str, Any] = {"name": "small", "model": {"family": "recurrent", "args": {"task": "char-lm"}}}


def job(**sections: Any) -> Job:
    return parse_job({**SMALLEST, **sections})


def refusal(**sections: Any) -> str:
    with pytest.raises(JobError) as caught:
        job(**sections)
    return str(caught.value)


def test_the_smallest_job_gets_every_default() -> None:
    small = job()
    assert (small.cluster.shards, small.cluster.workers) == (2, 2)
    assert small.consistency.mode == "async"
    assert (small.push.encoding, small.pull.encoding, small.push.tile) == ("int4", "ternary", 64)
    assert not small.pull.is_fresh
    assert small.model.args["cell"] == "lstm"  # the family's defaults are filled in as well
    assert small.data["name"] == "python-source"
    assert small.data["batch"] == 16


def test_a_resolved_job_reads_back_as_the_same_job() -> None:
    full = job(consistency={"mode": "bounded", "slack": 4}, push={"encoding": "int8"}, optimizer={"name": "adam"})
    text = full.json_text()
    assert "\n" not in text
    assert parse_job_text(text) == full


def test_a_job_cannot_be_changed_once_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        job().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"modle": {}}, ["job: modle: unknown field", "did you mean 'model'?"]),
        ({"push": {"encodng": "int8"}}, ["job: push.encodng: unknown field", "did you mean 'encoding'?", "tile"]),
        ({"push": {"encoding": "in8"}}, ["job: push.encoding: unknown encoding 'in8'", "did you mean 'int8'?", "bf16"]),
        ({"push": {"encoding": "int8", "tile": 63}}, ["job: push: tile 63", "power of two"]),
        ({"push": {"encoding": "topk", "density": 0}}, ["job: push.density: found 0", "greater than 0"]),
        ({"push": {"encoding": "sign", "rounding": "stochastic"}}, ["job: push: sign has no stochastic", "int4"]),
        ({"push": {"layers": {"out.*": "int5"}}}, ["job: push.layers: unknown encoding 'int5'", "did you mean 'int"]),
        ({"pull": {"encoding": "int8", "fresh": True}}, ["job: pull: fresh weights in 'int8' drift", "'bf16'"]),
        ({"pull": {"encoding": "bf16", "layers": {"*": "sign"}}}, ["fresh weights in 'sign' drift", "leave fresh out"]),
        ({"pull": {"encoding": "fp32", "publish_every": 2}}, ["job: pull: publish_every belongs to published"]),
        ({"pull": {"encoding": "adaptive"}}, ["job: pull.encoding: encoding 'adaptive' is for the other way", "coded"]),
        ({"push": {"layers": {"a": "coded"}}}, ["job: push.layers: encoding 'coded' is for the other way"]),
        ({"push": {"encoding": "adaptive", "tile": 4096}}, ["job: push: tile 4096 is more than adaptive takes"]),
        ({"push": {"error": 0.5}}, ["job: push: error belongs to encoding 'adaptive'", "0.5 with 'int4'"]),
        ({"push": {"error_limit": 0.9}}, ["job: push: error_limit belongs to encoding 'adaptive'"]),
        ({"push": {"encoding": "fp32", "density": 0.2}}, ["job: push: density belongs to encoding 'topk'", "fp32"]),
        ({"push": {"encoding": "adaptive", "error": 0.9, "error_limit": 0.8}}, ["job: push: error_limit 0.8 is less"]),
        ({"push": {"overlap": "maybe"}}, ["job: push.overlap: found 'maybe' (allowed: 'auto', True or False)"]),
        ({"push": {"encoding": "int3"}}, ["did you mean 'int8'? (known: adaptive, bf16, fp32,"]),
        ({"pull": {"encoding": "int3"}}, ["did you mean 'int8'? (known: bf16, coded, fp32,"]),
        ({"pull": {"publish_seconds": 0}}, ["job: pull.publish_seconds: found 0", "0.01"]),
        ({"optimizer": {"where": "client"}}, ["job: optimizer.where: found 'client'", "'worker'"]),
        ({"optimizer": {"name": "adagrd"}}, ["job: optimizer.name: found 'adagrd'", "did you mean 'adagrad'?"]),
        ({"optimizer": {"lr": -1}}, ["job: optimizer.lr: found -1", "greater than 0"]),
        ({"optimizer": {"lr": 1e39}}, ["job: optimizer.lr: found 1e+39", "less than or equal to 1000"]),
        ({"optimizer": {"epsilon": 1e-300}}, ["job: optimizer.epsilon: found 1e-300", "or equal to 0.0000"]),
        ({"optimizer": {"initial_accumulator": 1e39}}, ["job: optimizer.initial_accumulator: found 1e+39"]),
        ({"push": {"deadline_seconds": 1e-9}}, ["job: push.deadline_seconds: found 1e-09", "0.01"]),
        ({"optimizer": {"lr": "fast"}}, ["job: optimizer.lr: found 'fast'", "valid number"]),
        ({"optimizer": {"lr": float("nan")}}, ["job: optimizer.lr: found nan"]),
        ({"optimizer": {"lr": float("inf")}}, ["job: optimizer.lr: found inf"]),
        ({"consistency": {"mode": "bounded"}}, ["job: consistency", "needs slack"]),
        ({"consistency": {"mode": "async", "slack": 4}}, ["job: consistency", "slack belongs to mode 'bounded'"]),
        ({"consistency": {"mode": "async", "quorum": 2}}, ["job: consistency", "quorum belongs to mode 'sync'"]),
        ({"consistency": {"mode": "sync", "quorum": 3}}, ["consistency.quorum 3", "cluster.workers 2", "never fill"]),
        ({"consistency": {"mode": "elastic"}}, ["job: consistency.mode: 'elastic' is not supported yet", "'sync'"]),
        ({"consistency": {"mode": "boundd"}}, ["job: consistency.mode: found 'boundd'", "did you mean 'bounded'?"]),
        ({"durability": {"log": "journl"}}, ["job: durability.log: found 'journl'", "did you mean 'journal'?"]),
        ({"durability": {"backups": 1}}, ["job: durability: backups 1 with log 'none'", "use log 'journal'"]),
        ({"durability": {"log": "journal", "backups": 2}}, ["job: durability.backups: found 2", "0 or 1"]),
        (
            {"durability": {"log": "journal", "backups": 1}, "cluster": {"shards": 1}},
            ["durability.backups 1 with cluster.shards 1", "ask for 2 shards"],
        ),
        ({"routing": {"mode": "affinity"}}, ["job: routing.mode: 'affinity' is not supported yet", "'random'"]),
        ({"cluster": {"shards": 0}}, ["job: cluster.shards: found 0", "greater than or equal to 1"]),
        ({"cluster": {"workers": "two"}}, ["job: cluster.workers: found 'two'"]),
        ({"cluster": 2}, ["job: cluster: found 2"]),
        ({"stop": {"epochs": 0}}, ["job: stop.epochs: found 0"]),
        ({"stop": {"steps": 10**400}}, ["job: stop.steps: found 1", "less than or equal to"]),
        ({"pull": {"publish_every": 10**30}}, ["job: pull.publish_every: found 1", "less than or equal to"]),
        ({"consistency": {"mode": "bounded", "slack": 10**30}}, ["job: consistency.slack: found 1", "or equal to"]),
        ({"stop": {"epochs": 10**30}}, ["job: stop.epochs: found 1", "less than or equal to"]),
        ({"name": "../escape"}, ["job: name: found '../escape'"]),
        ({"name": ""}, ["job: name: found ''"]),
        ({"name": "a\n"}, ["job: name: found 'a\\n'"]),
        ({"seed": -1}, ["job: seed: found -1"]),
        ({"device": "gpu"}, ["job: device: found 'gpu'"]),
        ({"model": {"family": "recurent"}}, ["model.family: unknown family 'recurent'", "did you mean 'recurrent'?"]),
        (
            {"model": {"family": "recurrent", "args": {"task": "char-lm", "cell": "lstn"}}},
            ["job: model.args.cell: found 'lstn'", "did you mean 'lstm'?"],
        ),
        (
            {"model": {"family": "recurrent", "args": {"task": "char-lm", "hiden": 8}}},
            ["job: model.args.hiden: unknown field", "did you mean 'hidden'?"],
        ),
        ({"model": {"family": "recurrent", "args": {}}}, ["job: model.args.task: missing"]),
        ({"data": {"name": "ptbb"}}, ["job: data.name: found 'ptbb'", "did you mean 'ptb'?"]),
        ({"data": {"batch": 0}}, ["job: data.batch: found 0"]),
    ],
)  # fmt: skip
def test_a_wrong_field_is_refused_with_where_found_and_allowed(sections: dict[str, Any], parts: list[str]) -> None:
    text = refusal(**sections)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "push",
    [
        {"error": 0.6, "density": 0.01},
        {"encoding": "topk", "density": 0.2},
        {"layers": {"out.*": "topk"}, "density": 0.2},
        {"layers": {"out.*": "adaptive"}, "error": 0.5, "settling_updates": 0},
        {"overlap": True},
        {"overlap": False},
    ],
)
def test_a_setting_that_an_encoding_of_the_job_obeys_is_taken(push: dict[str, Any]) -> None:
    taken = job(push=push)
    assert parse_job_text(taken.json_text()) == taken


@pytest.mark.parametrize(("error", "limit"), [(0.5, 0.8), (0.6, 0.8), (0.9, 0.9)])
def test_the_error_limit_follows_a_larger_error(error: float, limit: float) -> None:
    assert job(push={"encoding": "adaptive", "error": error}).push.error_limit == limit


def test_every_problem_is_told_at_once() -> None:
    lines = refusal(stop={"epochs": 0}, seed="x", optimizer={"lr": 0}).splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["seed", "optimizer.lr", "stop.epochs"]


def test_problems_of_model_and_data_are_told_together() -> None:
    lines = refusal(model={"family": "recurrent", "args": {"task": "x"}}, data={"batch": -1}).splitlines()
    assert len(lines) == 2


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(refusal(name="x" * 10_000)) < 400


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "not readable as YAML"),
        ("", "is a mapping of fields, found None"),
        ("- a", "is a mapping of fields, found ['a']"),
        ("? [a, b]\n: c\n", "unhashable key"),
        ("name: !!python/object:os.system x", "not readable as YAML"),
        ("1: 2", "keys should be strings"),
        ("name: 2001-13-40", "not readable as YAML"),
    ],
)
def test_text_that_is_no_job_is_refused(text: str, part: str) -> None:
    with pytest.raises(JobError, match=r".+") as caught:
        parse_job_text(text, "f.yaml")
    assert str(caught.value).startswith("f.yaml: ")
    assert part in str(caught.value)


def test_a_field_that_is_given_twice_is_refused() -> None:
    text = "name: a\nseed: 1\nseed: 2\nmodel: {family: recurrent, args: {task: char-lm}}\n"
    with pytest.raises(JobError, match="f.yaml: .*'seed' is given twice"):
        parse_job_text(text, "f.yaml")


def test_a_deeply_nested_text_is_refused_and_does_not_crash() -> None:
    with pytest.raises(JobError, match="nested too deep"):
        parse_job_text("[" * 100_000, "f.yaml")


def test_expanding_aliases_are_refused_before_they_expand() -> None:
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12))
    with pytest.raises(JobError, match=r"f.yaml: .*aliases .* are not allowed.*line 2"):
        parse_job_text(f"l0: &l0 x\n{levels}\nname: a\ndata: *l11\n", "f.yaml")


def test_a_file_that_is_too_large_or_endless_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text("#" * 2**20 + "\nname: a\n")
    for path in (tmp_path / "large.yaml", Path("/dev/zero")):
        with pytest.raises(JobError, match=f"{path}: larger than 1048576 bytes"):
            load_job(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(JobError, match=r"pipe.yaml: not a file but a pipe"):
        load_job(tmp_path / "pipe.yaml")


KEYS = st.text() | st.integers() | st.sampled_from(sorted(Job.model_fields))
CONTENT = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


def _is_job_or_refused(parse: Callable[[], object]) -> bool:
    """False for a refusal without a word; any exception other than JobError fails the test."""
    try:
        parse()
    except JobError as error:
        return bool(str(error))
    return True


@given(CONTENT)
def test_any_content_is_a_job_or_a_job_error(content: object) -> None:
    assert _is_job_or_refused(lambda: parse_job(content))


@given(st.text(max_size=200))
def test_any_text_is_a_job_or_a_job_error(text: str) -> None:
    assert _is_job_or_refused(lambda: parse_job_text(text))


def test_a_missing_file_and_a_binary_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"absent.yaml: there is no such file"):
        load_job(tmp_path / "absent.yaml")
    with pytest.raises(JobError, match="not readable"):
        load_job(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match=r"binary.yaml: not readable"):
        load_job(binary)


def test_data_that_is_not_here_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PARAMSERVER_DATA", str(tmp_path))
    with pytest.raises(JobError, match=r"^data: data set 'ptb'.*PARAMSERVER_DATA"):
        check_data(job(data={"name": "ptb"}))
    with pytest.raises(JobError, match=r"^data: .*absent.txt"):
        check_data(job(data={"name": "text-file", "path": str(tmp_path / "absent.txt")}))
    check_data(job())


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"optimizer": {"name": "momentum"}, "cluster": {"workers": 4}}, "known to diverge beyond 2"),
        ({"optimizer": {"name": "sgd"}}, "loses accuracy with every worker"),
        ({"consistency": {"damping": "sqrt"}}, "helps 'sgd' only"),
        ({"optimizer": {"clip": None}}, "clip is off"),
        ({"push": {"encoding": "sign"}, "optimizer": {"name": "adam"}}, "use optimizer.where 'worker'"),
        ({"push": {"encoding": "adaptive"}}, "learn slowly at first"),
        ({"push": {"layers": {"embed": "ternary"}}}, "'ternary' (2 bits and less) with 'adagrad' on the server"),
    ],
)
def test_what_is_known_not_to_converge_warns(sections: dict[str, Any], part: str) -> None:
    assert any(part in warning for warning in job(**sections).warnings())


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"optimizer": {"name": "momentum"}, "cluster": {"workers": 4}, "consistency": {"mode": "sync"}},
        {"optimizer": {"name": "sgd"}, "consistency": {"damping": "sqrt"}},
        {"optimizer": {"name": "sgd", "clip": None}, "cluster": {"workers": 1}},
        {"push": {"encoding": "sign"}, "optimizer": {"name": "adam", "where": "worker"}},
        {"optimizer": {"name": "momentum", "where": "worker"}, "cluster": {"workers": 4}},
        {"push": {"encoding": "adaptive"}, "pull": {"encoding": "coded"}, "optimizer": {"where": "worker"}},
        {"push": {"encoding": "adaptive"}, "optimizer": {"name": "momentum"}},
    ],
)
def test_what_is_known_to_work_does_not_warn(sections: dict[str, Any]) -> None:
    assert job(**sections).warnings() == []


def test_the_schema_names_every_field_and_what_each_family_takes() -> None:
    schema = job_schema()
    json.dumps(schema)
    assert set(schema["properties"]) == set(Job.model_fields)
    assert set(schema["x-families"]) == set(families())
    assert "hidden" in schema["x-families"]["recurrent"]["args"]["properties"]
    assert {"fp32", "bf16", "int8"} <= set(schema["x-encodings"])


def test_the_examples_are_valid_jobs() -> None:
    found = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
    assert {path.stem for path in found} >= {"char-lm", "ptb-word-lm", "shakespeare"}
    for path in found:
        example = load_job(path)
        assert example.name == path.stem
        assert example.warnings() == []
        assert yaml.safe_load(path.read_text())["cluster"] == {"shards": 2, "workers": 2}
