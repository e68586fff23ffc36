"""The comparison of encodings: what its figures rest on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bits import command, confirmation
from benchmarks.bits.forgetful import ForgetfulDeltas
from benchmarks.bits.records import Record, read_records
from benchmarks.bits.settings import Cell, parse_setting
from benchmarks.bits.simulation import Start, make_start, simulate
from benchmarks.bits.statistics import paired_gap
from paramserver.cli.errors import InputError
from paramserver.encoding import make_encoding
from paramserver.job import OptimizerSettings, PullSettings
from paramserver.protocol.layout import Block
from paramserver.shard.block import HeldBlock
from paramserver.shard.optimizers import make_optimizer
from paramserver.shard.publishing import PublishedDeltas

STEPS = 6


def cell(setting: str, workers: int = 2) -> Cell:
    return Cell("char-lm", parse_setting(setting), workers, seed=3, steps=STEPS, warm_up=2)


@pytest.fixture(scope="module")
def start() -> Start:
    one = cell("fp32/fp32")
    return make_start(one.job(), one.seed, one.warm_up)


def test_a_gap_is_the_mean_of_pairs_with_students_interval() -> None:
    gap = paired_gap([1.01, 2.04, 4.12], [1.0, 2.0, 4.0])
    assert gap.mean == pytest.approx(2.0)
    assert gap.half_width == pytest.approx(4.303 / 3**0.5)  # the gaps 1, 2, 3 have standard deviation 1
    assert paired_gap([1.01], [1.0]).half_width is None


def test_a_setting_says_both_ways_and_what_differs() -> None:
    setting = parse_setting("sign/{encoding: ternary, tile: 128}+worker+forgetful")
    assert setting.ways.pull == {"encoding": "ternary", "tile": 128}
    assert (setting.where, setting.is_forgetful) == ("worker", True)
    with pytest.raises(InputError, match="'wroker'"):
        parse_setting("sign/ternary+wroker")


def test_the_same_cell_gives_the_same_outcome(start: Start) -> None:
    assert simulate(cell("int4/ternary"), start) == simulate(cell("int4/ternary"), start)


def test_full_precision_with_two_workers_is_fresh_whichever_way_it_is_pulled(start: Start) -> None:
    fresh = simulate(cell("fp32/fp32"), start)
    published = simulate(cell("fp32/{encoding: fp32, fresh: false}"), start)
    assert published.weights_loss == published.replica_loss == fresh.weights_loss
    assert (fresh.push_bits, fresh.pull_bits, fresh.residual) == (32, 32, 0)


def test_bits_are_those_of_an_encoded_element_and_step(start: Start) -> None:
    outcome = simulate(cell("{encoding: int4, settling_updates: 0}/fp32+worker"), start)
    assert outcome.push_bits == pytest.approx(4.25, rel=1e-3)
    assert (outcome.full_push_bits, outcome.pull_bits) == (32, 32)
    assert outcome.pushed_bytes < outcome.pulled_bytes / 7


def test_an_outcome_is_read_as_it_was_written(start: Start, tmp_path) -> None:
    record = Record(cell("sign/ternary+worker"), simulate(cell("sign/ternary+worker"), start))
    path = tmp_path / "results.jsonl"
    path.write_text(record.line() + "\n", encoding="utf-8")
    assert read_records([path]) == [record]
    path.write_text(json.dumps({"setting": "int4/ternary"}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"results\.jsonl"):
        read_records([path])


@pytest.mark.parametrize("kind", [PublishedDeltas, ForgetfulDeltas])
def test_only_forgetful_publishing_drifts(kind: type[PublishedDeltas]) -> None:
    elements, rounds = 2048, 200
    block = HeldBlock(
        Block(index=0, parameter="w", start=0, elements=elements, group="g"), make_optimizer(OptimizerSettings())
    )
    generator = np.random.default_rng(0)
    block.initialise(generator.normal(size=elements).astype(np.float32).view(np.uint8))
    publishing = kind({0: make_encoding("ternary")}, PullSettings(publish_every=1, still=0))
    publishing.begin(block)
    for _ in range(rounds):
        block.weights += generator.normal(scale=0.01, size=elements).astype(np.float32)
        block.version += 1
        publishing.applied(block, None)
    lag = float(np.linalg.norm(block.weights - publishing.replica(0).values)) / (0.01 * elements**0.5)
    assert (lag > 5) if kind is ForgetfulDeltas else (lag < 3)  # in movements of one round


def test_a_confirmation_pairs_launches_by_seed_and_goes_on_where_it_was_cut_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    launched: list[tuple[str, int]] = []

    def run_job(cell: Cell) -> dict[str, object]:
        launched.append((cell.setting.text, cell.seed))
        # Of the seed's reference at the same period 1% and 3% more.
        bits = {"fp32/fp32": 2.0, "int4/ternary": 2.5 * (1.01 + 0.02 * cell.seed)}.get(cell.setting.text, 2.5)
        parts = {f"{way}_bits_{of}": 4.0 for way in ("push", "pull") for of in ("encoded", "an_element")}
        loss = {"valid": {"bits": bits}}
        counts = {"pushed_bytes": 10, "pulled_bytes": 10, "steps": 2, "staleness": {"all": {"mean": 1.0}}}
        return {**loss, "replica": loss, **parts, **counts}

    monkeypatch.setattr(confirmation, "run_job", run_job)
    out = tmp_path / "launches.jsonl"
    command.main(["int4/ternary", "--confirm", "--workers", "8", "--out", str(out)])
    assert len(launched) == 3, "eight workers have two references"
    command.main(["int4/ternary", "--confirm", "--workers", "8", "--seeds", "0", "1", "--out", str(out)])
    assert [seed for _, seed in launched] == [0, 0, 0, 1, 1, 1]
    shown = capsys.readouterr().out
    assert len(json.loads(shown.splitlines()[-1])["confirmed"]) == 6
    assert "+2.00%" in shown, "the mean of the pairs"


def test_a_confirmation_without_its_references_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["int4/ternary", "--confirm", "--alone"])
    assert "leave out --alone" in capsys.readouterr().err
