"""The recurrent task: what it trains on, what it carries, and that its gradients are those of the plain module."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models.datasets.vocabulary import Vocabulary
from models.recurrent.arguments import RecurrentArguments, RecurrentData
from models.recurrent.corpus import NOT_PREDICTED, Corpus
from models.recurrent.net import RecurrentNet
from models.recurrent.task import RecurrentTask

MakeCorpus = Callable[..., Corpus]
CPU = torch.device("cpu")
CELLS = ["rnn", "lstm", "gru"]


def make_task(
    make_corpus: MakeCorpus, data: RecurrentData, *, seed: int = 1, valid: int = 50, **arguments: object
) -> RecurrentTask:
    checked = RecurrentArguments.model_validate({"task": "char-lm", "hidden": 6, "embedding": 5, **arguments})
    return RecurrentTask(checked, data, make_corpus(valid=valid), seed, CPU)


# --------------------------------------------------------------------------------- segmentation


def test_batches_are_the_windows_of_the_segments_in_order(make_corpus: MakeCorpus, small_data: RecurrentData) -> None:
    task, stream = make_task(make_corpus, small_data), make_corpus().streams["train"]
    batches = list(task.batches("train", [4, 0, 9]))
    assert [batch.index for batch in batches] == [0, 1, 2]
    for index, batch in enumerate(batches):
        assert batch.inputs.shape == batch.targets.shape == (3, 4)
        for row, example in enumerate((4, 0, 9)):
            start = example * 12 + index * 4
            assert batch.inputs[row].tolist() == stream[start : start + 4].tolist()
            assert batch.targets[row].tolist() == stream[start + 1 : start + 5].tolist()


@pytest.mark.parametrize("symbols", [2, 12, 13, 14, 50, 61])
def test_validation_predicts_every_symbol_but_the_first_once(
    make_corpus: MakeCorpus, small_data: RecurrentData, symbols: int
) -> None:
    task = make_task(make_corpus, small_data, valid=symbols)
    predicted = []
    for example in range(task.examples("valid")):
        for batch in task.batches("valid", [example]):
            kept = batch.targets[batch.targets != NOT_PREDICTED]
            assert batch.elements == len(kept) > 0
            predicted += kept.tolist()
    assert predicted == make_corpus(valid=symbols).streams["valid"][1:].tolist()


def test_training_segments_are_full_and_do_not_overlap(make_corpus: MakeCorpus, small_data: RecurrentData) -> None:
    task = make_task(make_corpus, small_data)
    assert task.examples("train") == 1999 // 12
    targets = [batch.targets for one in range(task.examples("train")) for batch in task.batches("train", [one])]
    predicted = torch.cat(targets, dim=1).flatten().tolist()
    assert predicted == make_corpus().streams["train"][1 : 1 + 1999 // 12 * 12].tolist()


def test_a_short_last_segment_counts_only_what_it_predicts(make_corpus: MakeCorpus, small_data: RecurrentData) -> None:
    task = make_task(make_corpus, small_data, valid=50)  # 49 predicted: four segments of 12 and one of 1
    together = [task.evaluate(batch) for batch in task.batches("valid", [3, 4])]
    apart = [task.evaluate(batch) for one in (3, 4) for batch in task.batches("valid", [one])]
    assert [one.elements for one in together] == [5, 4, 4]
    assert sum(one.loss_sum for one in together) == pytest.approx(sum(one.loss_sum for one in apart), rel=1e-6)
    means = [task.gradients(batch).loss for batch in task.batches("valid", [3, 4])]
    assert means == pytest.approx([one.loss_sum / one.elements for one in together], rel=1e-6)


def test_unknown_examples_and_splits_are_refused(make_corpus: MakeCorpus, small_data: RecurrentData) -> None:
    task = make_task(make_corpus, small_data)
    with pytest.raises(IndexError, match="example 5 of split 'valid' does not exist; it has 5"):
        task.batches("valid", [0, 5])
    with pytest.raises(IndexError, match="example -1"):
        task.batches("valid", [-1])
    with pytest.raises(KeyError, match="dev"):
        task.examples("dev")


# ---------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("cell", CELLS)
def test_carried_state_equals_one_long_sequence(make_corpus: MakeCorpus, small_data: RecurrentData, cell: str) -> None:
    task = make_task(make_corpus, small_data, cell=cell, layers=2)
    batches = list(task.batches("train", [3, 5]))
    inputs = torch.cat([batch.inputs for batch in batches], dim=1)
    targets = torch.cat([batch.targets for batch in batches], dim=1)
    with torch.no_grad():
        logits, _ = task.net(inputs)
    whole = F.cross_entropy(logits.transpose(0, 1).transpose(1, 2), targets, reduction="none").double()
    for index, batch in enumerate(batches):
        expected = whole[:, index * 4 : (index + 1) * 4].sum().item()
        assert task.evaluate(batch).loss_sum == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_each_lease_starts_from_zero_and_leases_do_not_mix(
    make_corpus: MakeCorpus, small_data: RecurrentData, cell: str
) -> None:
    task = make_task(make_corpus, small_data, cell=cell)
    alone = [task.gradients(batch).loss for batch in task.batches("train", [1, 2])]
    first, second = task.batches("train", [1, 2]), task.batches("train", [7, 8])
    between = []
    for mine, other in zip(first, second, strict=True):
        between.append(task.gradients(mine).loss)
        task.gradients(other)
    assert between == alone


def test_batches_out_of_order_are_refused(make_corpus: MakeCorpus, small_data: RecurrentData) -> None:
    task = make_task(make_corpus, small_data)
    first, second, _ = task.batches("train", [0])
    with pytest.raises(RuntimeError, match="window 1 was run where window 0"):
        task.gradients(second)
    task.gradients(first)
    with pytest.raises(RuntimeError, match="window 0 was run where window 1"):
        task.gradients(first)


def test_a_loss_that_is_not_finite_does_not_poison_the_rest_of_the_segment(
    make_corpus: MakeCorpus, small_data: RecurrentData
) -> None:
    task = make_task(make_corpus, small_data)
    first, second, _ = task.batches("train", [0])
    kept = {one.name: one.tensor.detach().clone() for one in task.parameters()}
    with torch.no_grad():
        for one in task.parameters():
            one.tensor.fill_(float("nan"))
    assert not np.isfinite(task.gradients(first).loss)
    with torch.no_grad():
        for one in task.parameters():
            one.tensor.copy_(kept[one.name])
    assert np.isfinite(task.gradients(second).loss)


# ------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_the_plain_module_with_a_detached_state(
    make_corpus: MakeCorpus, small_data: RecurrentData, cell: str, tied: bool
) -> None:
    task = make_task(make_corpus, small_data, cell=cell, tied=tied, embedding=6, layers=2)
    plain = RecurrentNet.from_state(task.net.arguments, task.export())
    state = None
    for batch in task.batches("train", [0, 4, 6]):
        step = task.gradients(batch)
        plain.zero_grad()
        logits, state = plain(batch.inputs, state)
        state = tuple(part.detach() for part in state) if cell == "lstm" else state.detach()
        loss = F.cross_entropy(logits.reshape(-1, 7), batch.targets.t().flatten())
        loss.backward()
        assert step.elements == 12
        assert step.loss == pytest.approx(loss.item(), rel=1e-6)
        named = dict(plain.named_parameters())
        assert list(step.gradients) == list(named) == [one.name for one in task.parameters()]
        for name, gradient in step.gradients.items():
            torch.testing.assert_close(gradient, named[name].grad, rtol=1e-5, atol=1e-7)


def test_gradients_agree_with_finite_differences(make_corpus: MakeCorpus, small_data: RecurrentData) -> None:
    task = make_task(make_corpus, small_data, tied=True, embedding=6, layers=2)
    task.net.double()  # float32 leaves too little for differences
    (batch, *_) = task.batches("train", [0, 4, 6])
    step = task.gradients(batch)
    for one in task.parameters():
        flat, gradient = one.tensor.detach().view(-1), step.gradients[one.name].view(-1)
        for place in (0, flat.numel() // 2, flat.numel() - 1):
            losses = []
            for shift in (1e-5, -2e-5):
                flat[place] += shift
                (fresh, *_) = task.batches("train", [0, 4, 6])
                losses.append(task.evaluate(fresh).loss_sum / fresh.elements)
            flat[place] += 1e-5
            assert gradient[place].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_gradients_belong_to_the_caller(make_corpus: MakeCorpus, small_data: RecurrentData) -> None:
    task = make_task(make_corpus, small_data)
    first, second, _ = task.batches("train", [0, 1])
    step = task.gradients(first)
    kept = {name: gradient.clone() for name, gradient in step.gradients.items()}
    task.gradients(second)
    for name, gradient in step.gradients.items():
        assert gradient.is_contiguous()
        assert torch.equal(gradient, kept[name])


def test_values_written_into_the_parameters_count_at_once(make_corpus: MakeCorpus, small_data: RecurrentData) -> None:
    task = make_task(make_corpus, small_data)
    views = {one.name: one.tensor.detach().view(-1).numpy() for one in task.parameters()}  # as the worker sees them
    (batch, *_) = task.batches("train", [0])
    before = task.evaluate(batch).loss_sum
    for view in views.values():
        view[:] = 0
    (batch, *_) = task.batches("train", [0])
    assert task.evaluate(batch).loss_sum == pytest.approx(batch.elements * np.log(7), rel=1e-6)
    assert before != pytest.approx(batch.elements * np.log(7), rel=1e-4)


# ----------------------------------------------------------------------------------- parameters


def test_parameters_are_grouped_by_layer(make_corpus: MakeCorpus, small_data: RecurrentData) -> None:
    task = make_task(make_corpus, small_data, layers=2)
    groups: dict[str, list[str]] = {}
    for one in task.parameters():
        groups.setdefault(one.group, []).append(one.name.split(".")[1])
    assert list(groups) == ["embedding", "recurrent.0", "recurrent.1", "output"]
    assert groups["recurrent.1"] == ["weight_ih_l1", "weight_hh_l1", "bias_ih_l1", "bias_hh_l1"]
    assert task.groups(next(task.batches("train", [0]))) == ()


def test_tied_weights_are_one_parameter(make_corpus: MakeCorpus, small_data: RecurrentData) -> None:
    tied = make_task(make_corpus, small_data, tied=True, embedding=6)
    names = [one.name for one in tied.parameters()]
    assert "output.weight" not in names
    assert "output.bias" in names
    assert len({one.tensor.data_ptr() for one in tied.parameters()}) == len(names)
    assert set(tied.export()) == set(names)


def test_a_seed_gives_the_same_parameters_in_every_process() -> None:
    script = (
        "import sys, hashlib, torch; from models.recurrent.arguments import RecurrentArguments\n"
        "from models.recurrent.net import RecurrentNet\n"
        "torch.manual_seed(int(sys.argv[1])); torch.rand(3)\n"
        "net = RecurrentNet(RecurrentArguments(task='char-lm', hidden=20), 30); net.initialise(7)\n"
        "print(hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in net.parameters())).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", script, "1"], capture_output=True, text=True, timeout=100, check=True
    ).stdout.strip()
    net = RecurrentNet(RecurrentArguments(task="char-lm", hidden=20), 30)
    net.initialise(7)
    here = hashlib.sha256(b"".join(one.detach().numpy().tobytes() for one in net.parameters())).hexdigest()
    assert other == here
    net.initialise(8)
    assert hashlib.sha256(b"".join(one.detach().numpy().tobytes() for one in net.parameters())).hexdigest() != here


def test_initial_values_keep_the_scale_and_the_forget_bias() -> None:
    net = RecurrentNet(RecurrentArguments(task="char-lm", hidden=8, init_scale=0.01, forget_bias=2.5), 30)
    net.initialise(0)
    named = dict(net.named_parameters())
    assert named["recurrent.bias_ih_l0"][8:16].tolist() == [2.5] * 8
    with torch.no_grad():
        named["recurrent.bias_ih_l0"][8:16] = 0
    assert 0.009 < max(one.abs().max().item() for one in named.values()) <= 0.01


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_loads_into_the_plain_module_with_the_same_loss(
    make_corpus: MakeCorpus, small_data: RecurrentData, tmp_path: Path, tied: bool
) -> None:
    task = make_task(make_corpus, small_data, tied=tied, embedding=6)
    save_file(dict(task.export()), tmp_path / "model.safetensors")
    plain = RecurrentNet.from_state(task.net.arguments, load_file(tmp_path / "model.safetensors"))
    (batch, *_) = task.batches("valid", [0, 1])
    with torch.no_grad():
        logits, _ = plain(batch.inputs)
    loss_sum = F.cross_entropy(logits.flatten(0, 1), batch.targets.t().flatten(), reduction="sum").item()
    assert task.evaluate(batch).loss_sum == loss_sum


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_learns_a_stream_with_a_rule(cell: str) -> None:
    # Each symbol follows from the last two, so a unigram or bigram model cannot reach this loss.
    stream = [0, 1]
    for _ in range(3000):
        stream.append((stream[-1] + stream[-2]) % 5)
    whole = np.array(stream, np.int32)
    corpus = Corpus({"train": whole, "valid": whole, "test": whole}, Vocabulary(tuple("abcde")))
    arguments = RecurrentArguments(task="char-lm", cell=cell, hidden=24)
    task = RecurrentTask(arguments, RecurrentData(batch=8, window=10, windows=5), corpus, 0, CPU)
    optimizer = torch.optim.Adam([one.tensor for one in task.parameters()], lr=0.01)
    for _ in range(6):
        for start in range(0, 56, 8):
            for batch in task.batches("train", range(start, start + 8)):
                step = task.gradients(batch)
                for one in task.parameters():
                    one.tensor.grad = step.gradients[one.name]
                optimizer.step()
    assert step.loss < 0.1
