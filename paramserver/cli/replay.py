"""`replay`: the journals of a job applied again, and what each update did on the way."""

from __future__ import annotations

import heapq
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paramserver.cli.errors import EXIT_FAILED, FailedError, InputError
from paramserver.cli.figures import number
from paramserver.cli.job_file import AsJson

if TYPE_CHECKING:
    from paramserver.shard.journal.review import Move, Review

JOURNALS = "journal"  # the folder of a run in which its parts' journals are, where the run has them
STALENESS_EDGES = (0, 1, 2, 4, 8, 16, 32, 64)  # lower edges of the classes in the table


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The job's folder, runs/JOB.", show_default=False)],
    state: Annotated[
        Path | None, typer.Option(help="Where the shards keep their journals (default: those of `up`).")
    ] = None,
    part: Annotated[str, typer.Option(help="Only this part of the model, for example shard-0.")] = "",
    until: Annotated[int | None, typer.Option(min=1, help="Stop after this record; needs --part.")] = None,
    block: Annotated[int | None, typer.Option(min=0, help="Tell of the updates of this block only.")] = None,
    worker: Annotated[str, typer.Option(help="Tell of this worker's updates only.")] = "",
    top: Annotated[int, typer.Option(min=0, max=10_000, help="So many of the largest moves.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Apply a job's journals again, compare the weights with its model, and show which updates moved them most."""
    if until is not None and not part:
        raise InputError("--until counts the records of one part; say which with --part")
    found = find_journals(run, state)
    if part and part not in found:
        raise InputError(f"--part {part!r}: found journals of {', '.join(sorted(found))} only")
    wanted = {name: path for name, path in sorted(found.items()) if part in ("", name)}
    account = Account(top, block, worker)
    reviews = {name: _review(path, account.of(name), until) for name, path in wanted.items()}
    weights = _compare(run / "model.safetensors", reviews) if until is None else {}
    if as_json:
        print(json.dumps(_as_json(reviews, weights, account), indent=1))
    else:
        _show(reviews, weights, account)
    if any(verdict == "differs" for verdict in weights.values()):
        raise typer.Exit(EXIT_FAILED)


def add_to(app: typer.Typer) -> None:
    app.command()(replay)


# ------------------------------------------------------------------------------ journals


def find_journals(run: Path, state: Path | None) -> dict[str, Path]:
    """The folder of each part's journal: the run's own, else those of the shards. Raises InputError."""
    if not run.is_dir():
        raise InputError(f"{run}: there is no such folder; give the job's folder, for example runs/char-lm")
    own = run / JOURNALS
    if state is None and own.is_dir() and (taken := {path.name: path for path in own.iterdir() if path.is_dir()}):
        return taken
    if state is None:
        from deploy.home import default_home

        state = default_home().directory / "state" / "shards"
    held: dict[str, list[Path]] = defaultdict(list)
    for folder in state.glob(f"*/{_escaped(run.resolve().name)}/*"):
        if folder.is_dir():
            held[folder.name].append(folder)
    if not held:
        raise InputError(
            f"{run}: no journal of this job in {own} nor under {state}; a job keeps one with durability "
            "{log: journal, keep: all}, and --state says where shards keep theirs"
        )
    return {name: _newest(paths) for name, paths in held.items()}


def take_journals(state: Path, run: Path) -> None:
    """Move the journals of a job that is over from where shards keep them into its run. Raises FailedError."""
    try:
        for name, path in find_journals(run, state).items():
            shutil.move(path, run / JOURNALS / name)
    except OSError as error:
        raise FailedError(f"{run / JOURNALS}: cannot take the journals of {state}: {error.strerror or error}") from None
    except InputError:
        print(f"paramserver: warning: {run}: its shards have left no journal", file=sys.stderr)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _newest(paths: list[Path]) -> Path:
    """Of the journals of one part on several shards the one that went on longest; of two that did the one that begins
    earlier, for what was a backup's may begin with a snapshot. Raises FailedError."""
    if len(paths) == 1:
        return paths[0]
    from paramserver.shard.journal.layout import JournalError
    from paramserver.shard.journal.review import first_of, last_of

    ranked: list[tuple[tuple[int, int], int, Path]] = []
    for path in sorted(paths):
        try:
            ranked.append((last_of(path), -first_of(path), path))
        except BlockingIOError:
            raise _held(path) from None  # the one that is held may be the part's, and the others stale
        except (JournalError, OSError):
            continue  # a stale one that is cut short; where all are, the review says why
    return max(ranked)[2] if ranked else paths[0]


def _review(path: Path, watch: Any, until: int | None) -> Review:
    from paramserver.shard.journal.layout import JournalError
    from paramserver.shard.journal.review import review

    try:
        return review(path, watch, until)
    except BlockingIOError:
        raise _held(path) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except JournalError as error:
        raise FailedError(str(error)) from None


def _held(path: Path) -> FailedError:
    return FailedError(f"{path}: a shard holds this journal; wait for the end of the job, or stop the shard")


# --------------------------------------------------------------------------------- weights


def _compare(model: Path, reviews: dict[str, Review]) -> dict[str, str]:
    """By parameter: whether the replayed weights are those of the model, bit for bit.

    "identical", "differs", "incomplete" where not all blocks were replayed, "absent" where the model has no tensor of
    that name and size. Empty where there is no model.
    """
    import numpy as np
    import safetensors.numpy
    from safetensors import SafetensorError

    if not model.is_file():
        return {}
    try:
        exported = safetensors.numpy.load_file(model)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{model}: is no model: {error}") from None
    blocks = {index: held for review in reviews.values() for index, held in review.serving.blocks.items()}
    layout = next(iter(reviews.values())).serving.order.layout
    verdicts: dict[str, str] = {}
    for parameter in layout.parameters:
        tensor = exported.get(parameter.name)
        own = [block for block in layout.blocks if block.parameter == parameter.name]
        if tensor is None or tensor.size != parameter.elements or tensor.dtype != np.float32:
            verdicts[parameter.name] = "absent"
        elif any(block.index not in blocks for block in own):
            verdicts[parameter.name] = "incomplete"
        else:
            flat = tensor.reshape(-1)
            same = all(
                blocks[block.index].weights.tobytes() == flat[block.start : block.start + block.elements].tobytes()
                for block in own
            )
            verdicts[parameter.name] = "identical" if same else "differs"
    return verdicts


# --------------------------------------------------------------------------------- moves


@dataclass
class Sum:
    """Moves added up."""

    updates: int = 0
    staleness: int = 0
    relative: float = 0.0
    largest: float = 0.0

    def add(self, move: Move) -> None:
        self.updates += 1
        self.staleness += move.staleness
        self.relative += move.relative
        self.largest = max(self.largest, move.relative)

    def figures(self) -> dict[str, float]:
        return {
            "updates": self.updates,
            "mean_staleness": self.staleness / self.updates,
            "mean_relative": self.relative / self.updates,
            "largest_relative": self.largest,
        }


@dataclass
class Account:
    """What the moves of all parts add up to, and the largest of them."""

    top: int
    block: int | None
    worker: str
    by_worker: dict[str, Sum] = field(default_factory=lambda: defaultdict(Sum))
    by_staleness: dict[int, Sum] = field(default_factory=lambda: defaultdict(Sum))
    _largest: list[tuple[float, int, str, Move]] = field(default_factory=list)
    _seen: int = 0

    def of(self, part: str) -> Any:
        """What a review of this part calls for every move."""

        def watch(move: Move) -> None:
            if self.block not in (None, move.block) or self.worker not in ("", move.worker):
                return
            self._seen += 1
            self.by_worker[move.worker].add(move)
            self.by_staleness[max(edge for edge in STALENESS_EDGES if edge <= move.staleness)].add(move)
            heapq.heappush(self._largest, (move.relative, -self._seen, part, move))
            if len(self._largest) > self.top:
                heapq.heappop(self._largest)

        return watch

    def largest(self) -> Iterator[tuple[str, Move]]:
        """With their part, the largest first."""
        for _, _, part, move in sorted(self._largest, reverse=True):
            yield part, move


def _as_json(reviews: dict[str, Review], weights: dict[str, str], account: Account) -> dict[str, Any]:
    return {
        "parts": {
            name: {
                "term": review.serving.order.term,
                "first_record": review.first,
                "last_record": review.last,
                "updates": sum(block.version for block in review.serving.blocks.values()),
                "build": review.build,
                "is_this_build": review.is_this_build,
            }
            for name, review in reviews.items()
        },
        "weights": weights,
        "largest": [{"part": part, **asdict(move)} for part, move in account.largest()],
        "by_worker": {name: sums.figures() for name, sums in sorted(account.by_worker.items())},
        "by_staleness": {str(edge): sums.figures() for edge, sums in sorted(account.by_staleness.items())},
    }


def _show(reviews: dict[str, Review], weights: dict[str, str], account: Account) -> None:
    for name, review in reviews.items():
        updates = sum(block.version for block in review.serving.blocks.values())
        records = f"records {review.first} to {review.last}"
        if review.last < review.first:
            records = f"a snapshot at record {review.last} and no record after it"
        print(
            f"{name}: {records} under term {review.serving.order.term}, "
            f"{len(review.serving.blocks)} blocks with {updates} updates"
        )
        if not review.is_this_build:
            print(f"  written by [{review.build}], which is not what computes here: last bits may differ")
    if weights:
        counts = {verdict: sum(one == verdict for one in weights.values()) for verdict in sorted(set(weights.values()))}
        text = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        print(f"weights against the model, bit for bit, of {len(weights)} parameters: {text}")
        for parameter, verdict in weights.items():
            if verdict != "identical":
                print(f"  {parameter}: {verdict}")
    if not account.by_worker:
        print("no update was replayed")
        return
    print("\nmoved most, relative to the block's weights:")
    print(
        f"{'part':<10} {'record':>8} {'block':>5} {'version':>8} {'staleness':>9} {'moved':>9}  "
        "worker, sequence, parameter"
    )
    for part, move in account.largest():
        print(
            f"{part:<10} {move.record:>8} {move.block:>5} {move.version:>8} {move.staleness:>9} "
            f"{number(100 * move.relative, 4):>8}%  {move.worker}/{move.incarnation}, {move.sequence}, {move.parameter}"
        )
    for title, sums in (
        ("worker", dict(sorted(account.by_worker.items()))),
        ("staleness from", {str(edge): one for edge, one in sorted(account.by_staleness.items())}),
    ):
        print(f"\n{title:<16} {'updates':>9} {'staleness':>9} {'moved, mean':>12} {'largest':>9}")
        for name, one in sums.items():
            figures = one.figures()
            print(
                f"{name:<16} {one.updates:>9} {figures['mean_staleness']:>9.2f} "
                f"{100 * figures['mean_relative']:>11.4f}% {100 * one.largest:>8.3f}%"
            )
