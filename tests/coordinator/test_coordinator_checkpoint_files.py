"""A checkpoint's files: whole or not there, and no flipped bit of them is believed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import yaml
from msgspec import structs

from paramserver.coordinator.checkpoints.files import CheckpointFiles, numbers
from paramserver.coordinator.checkpoints.keeper import CheckpointKeeper
from paramserver.coordinator.checkpoints.manifest import (
    FILE_NAME,
    FORMAT,
    CheckpointError,
    KeptFile,
    Manifest,
    decode_manifest,
    encode_manifest,
)
from paramserver.coordinator.checkpoints.reading import (
    Checkpoint,
    check_same,
    find_checkpoint,
    open_checkpoint,
    runs_of,
)
from paramserver.coordinator.checkpoints.resume import Resume, resumed_from, to_document
from paramserver.coordinator.effects import SealCheckpoint, StorePiece
from paramserver.job import Job, parse_job
from paramserver.protocol.layout import Parameter, cut_layout
from paramserver.protocol.messages import PartOrder
from paramserver.protocol.workerfile import KeptResidual, KeptWorker
from paramserver.router.leases import LeaseCut
from paramserver.shard.checkpoint import decode_block as decode
from paramserver.shard.checkpoint import part_file, restore_block
from paramserver.shard.journal.replay import kept
from paramserver.shard.serving import Serving

LAYOUT = cut_layout([Parameter("a", (5, 4), "one"), Parameter("b", (7,), "two"), Parameter("c", (3, 3), "two")])
PARTS = {"shard-0": (0, 2), "shard-1": (1,)}
SPECIFICATION: dict[str, Any] = {
    "name": "job",
    "model": {"family": "recurrent", "args": {"task": "char-lm"}},
    "data": {"batch": 4},
    "push": {"encoding": "int4"},
}


def job_of(**changes: Any) -> Job:
    return parse_job({**SPECIFICATION, **changes})


def served(part: str) -> Serving:
    """A part whose values tell their block, and whose worker-0 has pushed twice."""
    order = PartOrder(
        part=part,
        job="job",
        specification=job_of().json_text(),
        term=1,
        phase=0,
        layout=LAYOUT,
        blocks=PARTS[part],
    )
    serving = Serving(order)
    for index, block in serving.blocks.items():
        serving.initialise([(block, np.full(block.elements, index + 0.5, np.float32).view(np.uint8))])
        block.marks.advance("worker-0", 1, 2)
    return serving


def worker_file(name: str, sequences: dict[int, int]) -> bytes:
    arrays = {f"residual.{block}": np.full(LAYOUT.blocks[block].elements, 0.25, np.float32) for block in sequences}
    rows = tuple(
        KeptResidual(block, sequence, float(np.linalg.norm(arrays[f"residual.{block}"])))
        for block, sequence in sequences.items()
    )
    metadata = {"worker": msgspec.json.encode(KeptWorker(name, 1, rows)).decode()}
    return bytes(safetensors.numpy.save(arrays, metadata))


def take(runs: Path, run: str = "job", number: int = 1, keep: int = 2, job: Job | None = None) -> Path:
    """A whole checkpoint of two parts and one worker. Returns its folder."""
    job = job or job_of()
    (runs / run).mkdir(parents=True, exist_ok=True)
    (runs / run / "job.yaml").write_text(yaml.safe_dump(json.loads(job.json_text())))
    files = CheckpointFiles(runs / run)
    contents = {part: part_file(part, *kept(served(part))) for part in PARTS}
    listed = []
    for index, (part, content) in enumerate(contents.items()):
        listed.append(KeptFile(f"part-{index}.safetensors", "part", part, len(content), zlib.crc32(content)))
    own = worker_file("worker-0", {0: 2, 1: 1})
    listed.append(KeptFile("worker-0.safetensors", "worker", "worker-0", len(own), zlib.crc32(own)))
    for entry, content in zip(listed, [*contents.values(), own], strict=True):
        half = len(content) // 2
        files.store(number, entry.file, 0, memoryview(content)[:half])
        files.store(number, entry.file, half, memoryview(content)[half:])
    manifest = Manifest(
        format=FORMAT,
        job=run,
        number=number,
        taken="",
        specification=job.json_text(),
        layout=LAYOUT,
        fingerprint=LAYOUT.fingerprint,
        examples={"train": 40, "valid": 4, "test": 4},
        leases=LeaseCut(5, 4),
        sums={"train": {"leases": 2, "examples": 8, "steps": 4}},
        metric_sums={},
        files=tuple(listed),
    )
    files.seal(number, manifest, keep)
    return files.root / str(number)


def test_what_was_taken_is_read_block_by_block(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(take(tmp_path))
    for index, block in enumerate(LAYOUT.blocks):
        state, names, bodies = checkpoint.block(index)
        kept_block, arrays = decode(state, names, [memoryview(body) for body in bodies])
        assert kept_block.block.index == index
        np.testing.assert_array_equal(arrays[f"{index}.weights"], np.full(block.elements, index + 0.5, np.float32))
    size = checkpoint.workers["worker-0"].bytes
    pieces = [checkpoint.state("worker-0", offset, 100) for offset in range(0, size, 100)]
    assert safetensors.numpy.load(b"".join(pieces)).keys() == {"residual.0", "residual.1"}


def _read(checkpoint: Checkpoint) -> list[Any]:
    """Everything that a job takes from it, restored."""
    serving = Serving(structs.replace(served("shard-0").order, blocks=(0, 1, 2), resumes=True))
    for index in range(3):
        state, names, bodies = checkpoint.block(index)
        restore_block(serving, *decode(state, names, [memoryview(body) for body in bodies]))
    state, arrays = kept(serving)
    document = msgspec.json.encode({**to_document(resumed_from(checkpoint)), "folder": ""})
    return [state, {name: array.tobytes() for name, array in arrays.items()}, document]


@pytest.mark.parametrize("file", [FILE_NAME, "part-0.safetensors", "part-1.safetensors", "worker-0.safetensors"])
def test_a_flipped_byte_anywhere_is_refused(tmp_path: Path, file: str) -> None:
    folder = take(tmp_path)
    good = (folder / file).read_bytes()
    for place in range(len(good)):
        damaged = bytearray(good)
        damaged[place] ^= 1 << (place % 8)
        (folder / file).write_bytes(damaged)
        with pytest.raises(CheckpointError):
            open_checkpoint(folder)
    (folder / file).write_bytes(good)
    assert _read(open_checkpoint(folder))


@pytest.mark.parametrize("file", [FILE_NAME, "part-1.safetensors", "worker-0.safetensors"])
@pytest.mark.parametrize("how", ["gone", "cut", "longer"])
def test_a_file_that_is_not_whole_is_refused(tmp_path: Path, file: str, how: str) -> None:
    path = take(tmp_path) / file
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if how == "cut" else content + b"\0")
    with pytest.raises(CheckpointError, match=f"{file}|is not whole"):
        open_checkpoint(path.parent)


def test_a_manifest_of_another_format_says_so(tmp_path: Path) -> None:
    path = take(tmp_path) / FILE_NAME
    manifest = decode_manifest(path.read_bytes(), "here")
    with pytest.raises(CheckpointError, match="has format 9, this release knows 1"):
        decode_manifest(encode_manifest(structs.replace(manifest, format=9)), "here")


def test_a_checkpoint_is_there_under_its_number_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(OSError, match="No space"):
            take(tmp_path)
    assert numbers(tmp_path / "job" / "checkpoints") == []
    take(tmp_path, number=2)
    assert sorted(path.name for path in (tmp_path / "job" / "checkpoints").iterdir()) == ["2"], "what was aside is gone"


def test_a_checkpoint_with_a_piece_that_was_not_written_is_not_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be there, damaged, and an older one would go for it."""
    good = take(tmp_path, keep=1)
    manifest = decode_manifest((good / FILE_NAME).read_bytes(), "here")
    told: list[tuple[str, int, str]] = []
    keeper = CheckpointKeeper(tmp_path, lambda job, kind: None, lambda *over: told.append(over))

    def refuse(*of: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFiles, "store", refuse)
        keeper.touch(StorePiece("job", 2, "part-0.safetensors", 0, memoryview(b"half")))
    for kept_file in manifest.files:
        keeper.touch(StorePiece("job", 2, kept_file.file, 0, memoryview((good / kept_file.file).read_bytes())))
    keeper.touch(SealCheckpoint("job", 2, manifest, 1))
    keeper.close()
    ((job, number, why),) = told
    assert (job, number, "No space left on device" in why) == ("job", 2, True)
    assert numbers(tmp_path / "job" / "checkpoints") == [1]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for number in range(1, 5):
        take(tmp_path, number=number, keep=2)
    assert sorted(path.name for path in (tmp_path / "job" / "checkpoints").iterdir()) == ["3", "4"]


def test_what_is_dropped_leaves_nothing(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path)
    files.store(1, "part-0.safetensors", 0, memoryview(b"half"))
    files.drop(1)
    files.drop(2)
    assert list(files.root.iterdir()) == []


# ----------------------------------------------------------------------------------- finding


def test_the_newest_checkpoint_of_the_newest_run_is_found(tmp_path: Path) -> None:
    for run, number in (("job", 7), ("job-2", 1), ("job-2", 2), ("job-10", 1)):
        take(tmp_path, run, number)
    take(tmp_path, "job-other", 9, job=job_of(name="job-other"))
    take(tmp_path, "job-30", 9, job=job_of(name="job-30"))  # a job of that name, not the thirtieth run
    assert runs_of(tmp_path, "job") == ["job-10", "job-2", "job"]
    found, notes = find_checkpoint(tmp_path, job_of(), "")
    assert (found.place, notes) == ("job-10/1", [])
    assert find_checkpoint(tmp_path, job_of(), "job-2")[0].place == "job-2/2"
    assert find_checkpoint(tmp_path, job_of(), "job-2/1")[0].place == "job-2/1"
    assert find_checkpoint(tmp_path, job_of(), "job-2/checkpoints/1")[0].place == "job-2/1"


def _spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_that_is_said(tmp_path: Path) -> None:
    take(tmp_path, number=1)
    _spoil(take(tmp_path, number=2) / "part-1.safetensors")
    found, (note,) = find_checkpoint(tmp_path, job_of(), "")
    assert found.place == "job/1"
    assert "passed over a checkpoint" in note
    assert "part-1.safetensors: damaged" in note
    with pytest.raises(CheckpointError, match="damaged"):
        find_checkpoint(tmp_path, job_of(), "job/2")


def test_a_run_without_a_checkpoint_is_passed_over_and_that_is_said(tmp_path: Path) -> None:
    take(tmp_path, "job")
    take(tmp_path, "job-2", number=1).joinpath(FILE_NAME).parent.rename(tmp_path / "gone")
    found, (note,) = find_checkpoint(tmp_path, job_of(), "")
    assert found.place == "job/1"
    assert "the newest run, 'job-2', has no checkpoint" in note


@pytest.mark.parametrize(
    "wanted", ["../elsewhere", "job/../../x", "/etc", "job/1/2", "job/x", ".hidden/1", "job/" + "9" * 5000]
)
def test_a_place_outside_the_runs_cannot_be_named(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(CheckpointError, match="names no checkpoint"):
        find_checkpoint(tmp_path, job_of(), wanted)


@pytest.mark.parametrize("wanted", ["", "job", "job/1"])
def test_where_there_is_none_the_message_says_how_to_take_one(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(
        CheckpointError, match="there is no checkpoint of .* take one with `paramserver checkpoint JOB`"
    ):
        find_checkpoint(tmp_path / "runs", job_of(), wanted)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 4}, "seed: found 4, the checkpoint's is 0"),
        ({"push": {"encoding": "int8"}}, "push.encoding: found 'int8', the checkpoint's is 'int4'"),
        ({"model": {"family": "recurrent", "args": {"task": "char-lm", "hidden": 8}}}, "model.args.hidden: found 8"),
        ({"optimizer": {"name": "adam"}}, "optimizer.name: found 'adam'"),
        ({"data": {"batch": 5}}, "data.batch: found 5"),
        ({"stop": {"epochs": 2**40}}, "more than .* leases"),
    ],
)
def test_a_job_whose_state_rests_on_something_else_is_refused_with_the_field(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    take(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        find_checkpoint(tmp_path, job_of(**changes), "")


def test_cluster_end_durability_and_checkpoints_may_change(tmp_path: Path) -> None:
    manifest = open_checkpoint(take(tmp_path)).manifest
    changed: Callable[..., Job] = job_of
    check_same(
        changed(
            cluster={"shards": 7, "workers": 5},
            stop={"epochs": 9, "steps": 100},
            durability={"log": "journal"},
            checkpoint={"every_seconds": 60},
            device="cpu",
        ),
        manifest,
    )


# ---------------------------------------------------------------------------------- residuals


def test_a_residual_is_adopted_only_where_its_sequence_is_the_watermark_and_given_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(take(tmp_path))
    own = checkpoint.workers["worker-0"]
    # Saved after its updates 2 and 1; both blocks have taken its update 2.
    assert [residual.block for residual in own.adopted] == [0]
    resume = Resume(to_document(resumed_from(checkpoint)), {})
    lost, squares = resume.lost(is_over=False)
    assert (lost, squares) == (1, pytest.approx(0.25**2 * LAYOUT.blocks[1].elements))
    assert not resume.offers("worker-1", 1)
    assert resume.give("worker-0", 3)
    assert resume.give("worker-0", 3), "an answer that was lost is given again"
    assert not resume.give("worker-0", 4)
    assert Resume(to_document(resumed_from(checkpoint)), resume.taken).offers("worker-0", 3)
    assert resume.lost(is_over=True) == (1, squares)


def test_what_nobody_came_for_is_lost_when_training_is_over(tmp_path: Path) -> None:
    resume = Resume(to_document(resumed_from(open_checkpoint(take(tmp_path)))), {})
    elements = LAYOUT.blocks[0].elements + LAYOUT.blocks[1].elements
    assert resume.lost(is_over=True) == (1, pytest.approx(0.25**2 * elements))
